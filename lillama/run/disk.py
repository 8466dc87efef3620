"""What a run writes at its peak, and whether there is room for it. All figures are bytes."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

from lillama.errors import LillamaError
from lillama.factorise.inputs import kept_bytes
from lillama.lowrank.counts import stored
from lillama.plan.plan import factor_numbers, larger_numbers
from lillama.pretrained.streams import Place, budgets, choose
from lillama.recipe.schema import Finetune, Recipe
from lillama.report.words import size
from lillama.run import fewbits
from lillama.run.counts import Counts

SINGLE = 4  # bytes of a number while it is learned: float32
MOMENTS = 2 * SINGLE  # of AdamW
BESIDE = 8_000_000  # tokenizers, events, tables, the report
TIGHT = 1.2  # times what is needed: below, a warning


def inputs_alone(recipe: Recipe, tokens: int) -> int:
    """Of so many tokens of calibration, those of which only inputs are measured."""
    compress = recipe.compress
    return max(min(tokens - compress.fisher_tokens, compress.fisher_inputs or 0), 0)


def measured_streams(counts: Counts, blocks: int) -> tuple[Place, int]:
    """Where all streams of the blocks are while sensitivity is measured, and what they take with what is kept there."""
    known = counts.recipe.calibration.known_tokens or 0
    behind = inputs_alone(counts.recipe, known)
    # Those of inputs alone are there for one block, before and behind it, and what enters the first is there twice.
    kept = kept_bytes(counts.plan.layers, counts.narrows) if behind else 0
    beside = 3 * counts.source.working.itemsize * counts.width * behind + kept
    return streams(counts, blocks + 2, min(known, counts.recipe.compress.fisher_tokens), beside)


def streams(counts: Counts, copies: int, tokens: int, beside: int = 0) -> tuple[Place, int]:
    """Where so many streams of so many tokens are, with `beside` bytes more, and what they take."""
    needed = counts.source.working.itemsize * counts.width * tokens * copies + beside
    section = counts.recipe.run
    room = budgets(section.stream_device_memory, section.stream_memory, counts.device.device)
    return choose(needed, *room), needed


def needed(counts: Counts) -> int:
    """What the run directory holds at its peak. What is written anew stands beside the old until it is whole."""
    source, plan = counts.source, counts.plan
    unpacked = source.dtype.itemsize * plan.before if source.gguf else 0
    fisher = SINGLE * (2 * factor_numbers(plan.layers) + _of_neurons(counts)) if counts.measured else 0
    layers, model = SINGLE * sum(counts.kept.values()), source.dtype.itemsize * plan.after
    distilling = _one_by_one(counts, layers) if counts.sequential else _all_at_once(counts, layers)
    peaks = (
        _measuring(counts, fisher),
        fisher + distilling,
        fisher + layers + model,
        layers + model + finetuning(counts),
        layers + model * (2 if counts.recipe.finetune else 1) + quantised(counts),
    )
    return BESIDE + unpacked + max(peaks)


def _of_neurons(counts: Counts) -> int:
    """Numbers that tell which neurons can go, and those of the weights of MLPs without them, with their factors."""
    if not counts.narrows:
        return 0
    mlps = {name for layer in counts.plan.layers for mlp in layer.neurons for name in mlp.weights}
    left = sum(w.parameters + 2 * min(w.shape) ** 2 for name, w in counts.plan.weights.items() if name in mlps)
    return larger_numbers(counts.plan.layers) + left


def _measuring(counts: Counts, fisher: int) -> int:
    """All streams of the original's layers at once, where they are in files, or the factors that take their place."""
    if not counts.measured:
        return 0
    blocks = sum(layer.kind == "block" for layer in counts.plan.layers)
    place, every = measured_streams(counts, blocks)
    if place != "file":
        return fisher
    # Each stream goes as its layer's factors come.
    return max(every, fisher) + 3 * every // (blocks + 2)


def _one_by_one(counts: Counts, layers: int) -> int:
    """The finished layers, the streams that are in files, and the best state of the layer that learns."""
    count = 3 if "student" in counts.streams else 2
    place, flowing = streams(counts, count, counts.recipe.calibration.known_tokens or 0)
    best = 2 * SINGLE * max(counts.trained.values(), default=0) if counts.recipe.run.low_memory else 0
    return layers + best + (flowing if place == "file" else 0)


def _all_at_once(counts: Counts, layers: int) -> int:
    """Starting factors, and two snapshots while one takes the other's place, or one and the finished layers."""
    trained, low = sum(counts.trained.values()), counts.recipe.run.low_memory
    init = SINGLE * sum(counts.factors.values())
    snapshot = (2 * SINGLE + MOMENTS) * trained
    best = SINGLE * (trained + max(counts.trained.values(), default=0)) if low else 0
    tokens = min(counts.recipe.calibration.known_tokens or 0, counts.recipe.compress.gram_tokens) if counts.grams else 0
    place, flowing = streams(counts, 2, tokens)
    starting = init + (flowing if place == "file" else 0)
    return max(starting, init + max(2 * snapshot + best, snapshot + layers))


def finetuning(counts: Counts) -> int:
    """The trainer's checkpoints (three, and one that is being written), or three and the result."""
    section, plan = counts.recipe.finetune, counts.plan
    if section is None:
        return 0
    _, trained = learning(counts, section)
    one = (SINGLE * (1 if section.average is None else 2) + MOMENTS) * trained
    held = min(section.checks, 3)
    return max(min(section.checks, 4) * one, held * one + counts.source.dtype.itemsize * plan.after)


def quantised(counts: Counts) -> int:
    """The checkpoint in few bits; weights that may take another form in the largest."""
    section, source = counts.recipe.quantize, counts.source
    if section is None:
        return 0
    return fewbits.checkpoint_bytes(section, counts.plan, source.model, source.dtype.itemsize, most=True)


def learning(counts: Counts, section: Finetune) -> tuple[int, int]:
    """Parameters of the model as it is fine-tuned, and how many of them learn: two factors, whatever the storage."""
    plan = counts.plan
    whole = plan.after + _numbers(counts, "factors") - _numbers(counts, plan.storage)
    if section.lora is None:
        return whole, whole - _frozen(counts, section.freeze)
    adapters = section.lora.rank * sum(w.copies * sum(w.shape) for layer in plan.layers for w in layer.weights)
    return whole + adapters, adapters


def _numbers(counts: Counts, storage: str) -> int:
    weights = counts.plan.weights
    return sum(stored(weights[name], rank, storage) for name, rank in counts.plan.ranks.items())


def _frozen(counts: Counts, globs: list[str] | None) -> int:
    """Parameters of the compressed model that fine-tuning leaves as they are."""
    plan = counts.plan
    if globs is None:
        globs = ["*encoder.*"] if counts.source.config.is_encoder_decoder else []
    replaced = tuple(f"{name}." for name in plan.ranks)
    numbers = {f"{n}.weight": stored(plan.weights[n], rank, "factors") for n, rank in plan.ranks.items()}
    numbers |= {n: p.numel() for n, p in counts.source.model.named_parameters() if not n.startswith(replaced)}
    return sum(count for n, count in numbers.items() if any(fnmatch.fnmatchcase(n, glob) for glob in globs))


def available(out: Path) -> int:
    """What a run in the directory `out` may fill: what is free, and what an earlier process left there."""
    place = out.expanduser().absolute()
    held = 0
    for folder, _, names in os.walk(place):
        held += sum(_bytes(Path(folder) / name) for name in names)
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free + held


def _bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # gone meanwhile
        return 0


def check(wanted: int, out: Path) -> str | None:
    """A warning where the room for `wanted` bytes is tight; LillamaError where there is less. None: there is enough."""
    free = available(out)
    said = f"the run needs {size(wanted)} of disk, and {size(free)} are free for {out}"
    if free < wanted:
        raise LillamaError(said, where="run.out", hint="Make room, or give a run.out on another disk.")
    return f"little room: {said}" if free < TIGHT * wanted else None
