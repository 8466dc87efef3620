"""Ways to learn the original's predictions, at equal tokens: the divergence that is left after so many of them.

    python benchmarks/learning.py runs/quickstart --text package:pydoc_data.topics:train[:80%] --updates 60 \\
        --other wiki=wiki.test.raw:train --ways adamw averaged restarted orthonormal muon

Every way starts from the compressed model of a finished run (RUN/model) and sees the same sequences of its text in the
same order; all but the embedding learns, norms at a rate of their own, over a cosine. What is printed and drawn is the
mean KL divergence from the original, in nats per token, on text that is kept out and on --other text. Points are kept
in --out, where the command goes on. Two cores take three to five minutes for sixty updates of SmolLM2-135M.

  adamw        AdamW on the two factors of every weight
  averaged     the same, of which the mean of all states is judged (finetune.average: 0.0)
  restarted    AdamW whose moments are forgotten four times
  orthonormal  AdamW on factors of which one has orthonormal columns at the start, not both the same size
  muon         Muon on the factors, AdamW on vectors
  soap         SOAP on the factors, AdamW on vectors (needs pytorch_optimizer, which the package does not install)

A rate after the name is the way's own: adamw:8e-5.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from frontier import texts_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
from lillama.base import quiet
from lillama.base.device import choose
from lillama.data.text import token_blocks
from lillama.finetune.average import Average
from lillama.finetune.divided import learned_of
from lillama.finetune.faster import quick_attention
from lillama.finetune.loss import loss_of
from lillama.lowrank.conversions import use_trainable_storage
from lillama.lowrank.swap import factor_modules
from lillama.recipe.schema import Calibration
from lillama.report import plots

Learning = tuple[nn.Module, list[torch.optim.Optimizer]]
RATES = {"muon": 2e-4, "soap": 2e-4}  # where none is given; others have that of AdamW
RATE, OF_VECTORS = 4e-5, 1e-3
WARMUP = 0.05


def adamw(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def muon(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """Updates of the size that AdamW's have, so that its rates are near."""
    return torch.optim.Muon(parameters, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def soap(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise SystemExit("soap: pip install pytorch_optimizer") from error
    return SOAP(parameters, lr=rate, weight_decay=0.0, precondition_frequency=10, max_precondition_dim=1024)


OF_MATRICES: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {"muon": muon, "soap": soap}


def orthonormal(model: nn.Module) -> None:
    """A = Q R by QR: Q in place of A, R B in place of B."""
    for _, module in factor_modules(model):
        if isinstance(getattr(module, "A", None), nn.Parameter):
            Q, R = torch.linalg.qr(module.A.data.double())
            module.A.data, module.B.data = Q.float(), (R @ module.B.data.double()).float()


def forget(optimizers: list[torch.optim.Optimizer]) -> None:
    """Begin the moments again."""
    for optimizer in optimizers:
        optimizer.state.clear()


def learning(place: Path, way: str, rate: float) -> Learning:
    """The compressed model as it learns, and what steps it."""
    model = lillama.load(place, dtype=torch.float32).train()
    use_trainable_storage(model)
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.requires_grad_(False)
    if way == "orthonormal":
        orthonormal(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learned if parameter.dim() == 2]
    vectors = [parameter for parameter in learned if parameter.dim() != 2]
    return model, [OF_MATRICES.get(way, adamw)(matrices, rate), adamw(vectors, OF_VECTORS)]


def share(update: int, updates: int) -> float:
    """Of the peak rate: a warm-up, then a cosine."""
    warm = max(1, round(WARMUP * updates))
    if update < warm:
        return (update + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def losses(model: nn.Module, teacher: nn.Module, ids: Tensor, args: argparse.Namespace) -> Tensor:
    """The mean divergence of a batch [B, T]."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with args.device.autocast():
        return loss_of(model, teacher, inputs, 1.0, True)[0]


def judged(model: nn.Module, teacher: nn.Module, texts: Mapping[str, Tensor], args: argparse.Namespace) -> Any:
    """The mean divergence on every text."""
    model.eval()
    with torch.no_grad():
        found = {
            name: sum(losses(model, teacher, some, args).item() * len(some) for some in ids.split(args.batch))
            / len(ids)
            for name, ids in texts.items()
        }
    model.train()
    return found


def points(way: str, teacher: nn.Module, texts: Mapping[str, Tensor], args: argparse.Namespace) -> Iterator[Any]:
    """Learn, and judge at every check: what a line of the file says."""
    name, _, given = way.partition(":")
    rate = float(given) if given else RATES.get(name, RATE)
    model, optimizers = learning(args.run / "model", name, rate)
    average = Average(learned_of(model), 1 if name == "averaged" else None)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    held = {place: ids for place, ids in texts.items() if place != "learned"}
    seconds = 0.0
    yield {"way": way, "tokens": 0, "seconds": 0.0, **judged(model, teacher, held, args)}
    with quick_attention(model, teacher, args.device, args.length):
        for update, ids in enumerate(texts["learned"].split(args.batch)):
            start = time.perf_counter()
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * share(update, args.updates)
            losses(model, teacher, ids, args).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.add(update + 1)
            if name == "restarted" and (update + 1) % math.ceil(args.updates / 4) == 0:
                forget(optimizers)
            seconds += time.perf_counter() - start
            if (update + 1) % math.ceil(args.updates / args.checks) == 0 or update + 1 == args.updates:
                tokens = (update + 1) * ids.numel()
                with average.in_place():
                    found = judged(model, teacher, held, args)
                yield {"way": way, "tokens": tokens, "seconds": round(seconds, 1), **found}


def blocks(given: tuple[str, str], tokens: int, tokenizer: Any, args: argparse.Namespace) -> Tensor:
    """Sequences [N, T] of a text, in an order of chance."""
    place, split = given
    ids = token_blocks(tokenizer, Calibration(dataset=place, split=split, sequence_length=args.length), "--text")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    count = -(-tokens // args.length)
    if len(ids) < count:
        raise SystemExit(f"{place}: {len(ids)} sequences of {args.length} tokens, {count} are wanted")
    return ids[order[:count]]


def drawn(lines: list[dict[str, Any]], name: str) -> str:
    """The chart of one text."""
    ways = dict.fromkeys(line["way"] for line in lines)
    series = {way: [(line["tokens"], line[name]) for line in lines if line["way"] == way] for way in ways}
    return plots.standalone(plots.lines(series, "tokens learned from", f"KL divergence, nats per token ({name})"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory that holds the original and the compressed model")
    parser.add_argument("--text", required=True, help="DATASET:SPLIT to learn from")
    parser.add_argument("--other", action="append", default=[], help="NAME=DATASET:SPLIT, to judge on as well")
    parser.add_argument("--ways", nargs="+", default=["adamw", "averaged", "restarted", "orthonormal", "muon"])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--checks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--judge-tokens", type=int, default=4096, help="of every text that is judged on")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    quiet.quiet_libraries()
    args.device = choose()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.run / "model")
    own = texts_of([f"learned={args.text}"])["learned"]
    every = blocks(own, args.updates * args.batch * args.length + args.judge_tokens, tokenizer, args)
    count = args.updates * args.batch
    texts = {"learned": every[:count], "held out": every[count:]}
    for name, given in texts_of(args.other).items():
        texts[name] = blocks(given, args.judge_tokens, tokenizer, args)
    teacher = AutoModelForCausalLM.from_pretrained(args.run / "original", dtype=torch.float32).eval()
    file = args.out / "points.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    for way in args.ways:
        if any(line["way"] == way and line["tokens"] == count * args.length for line in lines):
            continue
        lines = [line for line in lines if line["way"] != way]
        for point in points(way, teacher, texts, args):
            lines.append(point)
            print(json.dumps(point), flush=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name in list(texts)[1:]:
        (args.out / f"{name.replace(' ', '-')}.svg").write_text(drawn(lines, name), encoding="utf-8")


if __name__ == "__main__":
    main()
