"""Perplexity against bytes: the original in few bits, and results of low rank in full and in few bits, in one run.

    python benchmarks/frontier.py --text help=package:pydoc_data.topics:train[80%:] --text other=wiki.test.raw:train

The original is rounded to 8, 4 and 3 bits, each number for itself (nearest) and compensated; ours are the quickstart's
recipe at several reductions, in 16, 8 and 4 bits, compensated, each weight in the form that loses least for its bytes.
Embeddings stay in 16 bits everywhere. All see the same calibration text, the recipe's. Points are kept in --out, where
the command goes on; in the end a table and a chart for each text (frontier.NAME.svg) are made of them. On two cores the
quickstart's four runs take most of an hour.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
from lillama.base import quiet
from lillama.base.device import choose
from lillama.base.progress import Progress
from lillama.base.rundir import FINETUNED, MODEL
from lillama.bits.compensate import round_compensated
from lillama.bits.moments import Reading, Wanted, gather
from lillama.bits.stage import quantise_model
from lillama.data.batches import text_batches
from lillama.data.text import token_blocks
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import perplexity
from lillama.lowrank.coded import round_nearest, spread
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.swap import factor_modules
from lillama.recipe.schema import Quantize

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
GROUP = 32
FULL = 2  # bytes of a number in 16 bits
BITS = (8, 4, 3)


class Points:
    """What was measured, by name, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.found: dict[str, dict[str, Any]] = {point["name"]: point for point in map(json.loads, lines)}

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a point unless that was done."""
        if name not in self.found:
            self.found[name] = {"name": name, **measure()}
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(self.found[name]) + "\n")
            print(json.dumps(self.found[name]), flush=True)


def texts_of(given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """name -> (data set, split) of `NAME=DATASET:SPLIT`."""
    found = {}
    for one in given:
        # The colon before the split: a slice of it, train[80%:], has one of its own.
        parts = re.fullmatch(r"([^=]+)=(.+):([^:\[\]]+(?:\[.*\])?)", one)
        if parts is None:
            raise SystemExit(f"--text {one}: write NAME=DATASET:SPLIT")
        name, place, split = parts.groups()
        found[name] = (place, split)
    return found


def measured(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """The perplexity of every text."""
    context = Context(tokenizer, "cpu")
    return {
        name: perplexity(model, context, dataset=place, split=split, tokens=args.tokens)["perplexity"]
        for name, (place, split) in texts_of(args.text).items()
    }


def bytes_of(model: Any) -> int:
    """Bytes of the weights, each once: codes and scales where there are such, 16 bits for every other number."""
    total = FULL * sum(parameter.numel() for parameter in model.parameters())
    for _, module in factor_modules(model):
        for matrix in module.matrices().values():
            if isinstance(matrix.storage, Rounded):
                total += sum(module.get_buffer(matrix.prefix + s).numel() for s in matrix.storage.shared_indices)
    return total


def linears(model: Any) -> list[str]:
    """The names of the linears that are rounded: all but the head."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]


def rounded_original(model: Any, bits: int, reading: Reading | None) -> int:
    """Round the linears of a dense model in place; the bytes that all of it would take."""
    wanted = [Wanted(name, "linear", tuple(model.get_submodule(name).weight.shape)) for name in linears(model)]
    known = ((one, None) for one in wanted) if reading is None else gather(model, wanted, reading)
    total = FULL * sum(parameter.numel() for parameter in model.parameters())
    for one, moments in known:
        W = model.get_submodule(one.name).weight
        codes, scales = (
            round_nearest(W.data, bits, GROUP)
            if moments is None
            else round_compensated(W.data, moments.inputs, bits, GROUP, moments.outputs)
        )
        W.data = codes * spread(scales, GROUP, W.shape[1])
        total += codes.numel() * bits // 8 + FULL * scales.numel() - FULL * codes.numel()
    return total


def originals(points: Points, place: Path, reading: Reading, args: argparse.Namespace) -> None:
    """The original in 16 bits, and rounded."""
    tokenizer = AutoTokenizer.from_pretrained(place)

    def point(bits: int, given: Reading | None) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        size = bytes_of(model) if bits == 16 else rounded_original(model, bits, given)
        return {"kind": "original", "bits": bits, "bytes": size, **measured(model, tokenizer, args)}

    points.add("original, 16 bits", lambda: point(16, None))
    for bits in BITS:
        points.add(f"original, {bits} bits, nearest", lambda bits=bits: point(bits, None))
        points.add(f"original, {bits} bits, compensated", lambda bits=bits: point(bits, reading))


def ours(points: Points, place: Path, reduction: float, reading: Reading, args: argparse.Namespace) -> None:
    """A result of low rank, in full and rounded."""
    tokenizer = AutoTokenizer.from_pretrained(place)

    def point(bits: int) -> dict[str, Any]:
        model = lillama.load(place, dtype=torch.float32).eval()
        if bits < 16:
            section = Quantize.model_validate({"bits": bits, "tokens": reading.tokens})
            offered = [(name, "linear") for name in linears(model)]
            where = {"device": reading.device, "progress": reading.progress}
            quantise_model(model, section, offered=offered, batches=reading.batches, **where)
        size = bytes_of(model)
        return {"kind": "ours", "reduction": reduction, "bits": bits, "bytes": size, **measured(model, tokenizer, args)}

    for bits in (16, 8, 4):
        points.add(f"{reduction:.0%} removed, {bits} bits", lambda bits=bits: point(bits))


def table(points: Points, names: Sequence[str]) -> str:
    """All points, the largest first."""
    rows = sorted(points.found.values(), key=lambda point: -point["bytes"])
    lines = ["| | MiB | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for point in rows:
        numbers = " | ".join(f"{point[name]:.3f}" for name in names)
        lines.append(f"| {point['name']} | {point['bytes'] / 2**20:.1f} | {numbers} |")
    return "\n".join(lines)


def chart(points: Points, name: str, file: Path) -> None:
    """Perplexity against bytes, a line for each way."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    ways: dict[str, list[tuple[float, float]]] = {}
    for point in points.found.values():
        compensated = "compensated" in point["name"] or point["bits"] == 16
        way = f"{point['reduction']:.0%} removed" if point["kind"] == "ours" else "original"
        way += "" if point["kind"] == "ours" or compensated else ", nearest"
        ways.setdefault(way, []).append((point["bytes"] / 2**20, point[name]))
    for way, line in sorted(ways.items(), key=lambda one: (not one[0].startswith("original"), one[0])):
        axes.plot(*zip(*sorted(line)), marker="o", label=way)
    axes.set(xlabel="MiB of weights", ylabel=f"perplexity ({name})", yscale="log")
    for of_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        of_ticks(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity against bytes.")
    parser.add_argument("--text", action="append", required=True, help="NAME=DATASET:SPLIT, to measure on")
    parser.add_argument("--reductions", default="0.1,0.2,0.3,0.4")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--statistics", type=int, default=8192, help="calibration tokens that rounding is fitted on")
    parser.add_argument("--set", action="append", default=[], help="of the quickstart's recipe: dotted.key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    args = parser.parse_args()
    names = list(texts_of(args.text))
    quiet.quiet_libraries()
    args.out.mkdir(parents=True, exist_ok=True)
    points = Points(args.out / "points.jsonl")
    reading = original = None
    for reduction in map(float, args.reductions.split(",")):
        out = args.out / f"{reduction:.0%}"
        recipe = lillama.Recipe.load(
            RECIPE, ["compress.neurons=null", *args.set, f"compress.reduction={reduction}", f"run.out={out}"]
        )
        recipe = recipe.model_copy(update={"evaluate": {}, "quantize": None})
        lillama.compress(recipe, progress=Progress())
        original = original or (out / "original" if (out / "original").is_dir() else Path(recipe.model.id))
        if reading is None:
            blocks = token_blocks(AutoTokenizer.from_pretrained(original), recipe.calibration)
            batches = text_batches(blocks, recipe.distill.batch_size)
            reading = Reading(batches, args.statistics, choose("cpu", "float32"), Progress())
            originals(points, original, reading, args)
        ours(points, out / (MODEL if recipe.finetune is None else FINETUNED), reduction, reading, args)
    print(table(points, names))
    (args.out / "table.md").write_text(table(points, names) + "\n", encoding="utf-8")
    for name in names:
        chart(points, name, args.out / f"frontier.{name}.svg")


if __name__ == "__main__":
    main()
