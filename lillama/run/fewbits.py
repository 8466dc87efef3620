"""What `quantize` will do to a planned model: which weights, how many bytes are left, what it takes, what cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lillama.bits.apply import FORMS, named
from lillama.bits.moments import Wanted, passes
from lillama.bits.targets import Target, find_ends, is_even
from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.lowrank.counts import matrix_bytes
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.storage import get_storage, rounded
from lillama.lowrank.whole import NAME as DENSE
from lillama.plan.budget import Budget
from lillama.plan.budget import is_even as is_even_form
from lillama.plan.plan import Plan
from lillama.pretrained.source import Source
from lillama.recipe.schema import Quantize, Recipe
from lillama.run.counts import Counts

ROUNDING = 6  # copies of a matrix in float32 while scales for it are tried
SQUARES = 6  # float64 matrices of d_in x d_in, or d_out x d_out, while one is rounded


def planned_targets(plan: Plan, model: Any, what: str) -> list[Target]:
    """The weights that `bits.targets.find_targets` will find once the plan is carried out, the ends left out."""
    outside = {end.name for end in find_ends(model)}
    found = []
    for weight in plan.weights.values():
        rank = plan.ranks.get(weight.name)
        if weight.name in outside or (rank is None and (what == "factors" or weight.kind == "embedding")):
            continue
        shape = (weight.copies, *weight.shape) if weight.kind == "experts" else weight.shape
        storage = DENSE if rank is None else plan.storage
        found.append(Target(weight.name, weight.kind, shape, rank or min(weight.shape), storage, weight.tied))
    return found


def planned_ends(plan: Plan, model: Any) -> list[Target]:
    """The embedding and the head as they will be."""
    return [
        replace(end, rank=plan.ranks[end.name], storage=plan.storage) if end.name in plan.ranks else end
        for end in find_ends(model)
    ]


def check_quantize(recipe: Recipe, plan: Plan, model: Any) -> None:
    """LillamaError for a `quantize` that could keep nothing in few bits, or not the plan's storage."""
    section = recipe.quantize
    if section is None:
        return
    if plan.ranks:
        weight = plan.weights[next(iter(plan.ranks))]
        _refuse_odd(plan.storage, weight, plan.ranks[weight.name])
    if not any(True for _ in _kept(section, plan, model)):
        odd_ones = section.bits != 8 and any(planned_targets(plan, model, section.what))
        raise LillamaError(
            "no weight is left that few bits could hold",
            where="quantize.bits" if odd_ones else "quantize.what",
            hint="4 bits want an even number of columns; 8 bits take any."
            if odd_ones
            else "what: linears and what: all take weights that stayed dense.",
        )


def _refuse_odd(storage: str, weight: Weight, rank: int) -> None:
    """LillamaError for a storage of which something is no matrix."""
    shapes = get_storage(storage).shapes(*weight.shape, rank)
    odd = [suffix for suffix in get_storage(storage).parameters if len(shapes[suffix]) != 2]
    if odd:
        raise LillamaError(
            f"the storage '{storage}' cannot be kept in few bits: its tensor '{odd[0]}' is no matrix",
            where="quantize",
            hint="Leave quantize out, or use compress.storage: pivoted or factors.",
        )


def budget_of(recipe: Recipe, layers: Sequence[Layer], source: Source) -> Budget:
    """The bytes of `compress.size`, and the storages that every weight may be kept in for them."""
    section, storage, each = recipe.quantize, recipe.compress.storage, source.dtype.itemsize
    weights = [weight for layer in layers for weight in layer.weights if not weight.tied]
    ends = {end.name: end for end in find_ends(source.model)}
    if section is not None and weights:
        _refuse_odd(storage, weights[0], 1)
    dense, ranked = {}, {}
    for weight in weights:
        widths = _widths(section, weight.name in ends)
        bases = (storage,) if section is None or weight.name in ends or section.storage == "keep" else _bases(storage)
        ranked[weight.name] = _names(bases, widths, section) or (storage,)
        stays = section is None or section.what == "factors" or (weight.kind == "embedding" and weight.name not in ends)
        names = () if stays else _names((DENSE,), widths, section)
        dense[weight.name] = tuple(name for name in names if is_even_form(weight, None, name)) or (DENSE,)
    before = each * source.parameters
    outside = before - each * sum(weight.parameters for weight in weights)
    for end in ends.values():
        if end.name not in dense and not end.tied and section is not None and section.what == "all":
            form = rounded(DENSE, section.embedding, section.group_size)
            if is_even(form, end):
                outside += matrix_bytes(form, end.matrix, end.rank, each) - each * math.prod(end.matrix)
    twice = frozenset(weight.tied for layer in layers for weight in layer.weights if weight.tied)
    return Budget(before, int((recipe.compress.size or 1) * before), each, outside, dense, ranked, twice)


def _widths(section: Quantize | None, end: bool) -> tuple[int, ...]:
    """The bits that a weight may get; none: it stays in full."""
    if section is None or (end and section.what != "all"):
        return ()
    return (section.embedding,) if end else section.widths


def _bases(storage: str) -> tuple[str, ...]:
    """The forms of low rank that `storage: auto` tries."""
    return tuple(dict.fromkeys((storage, *(form for form in FORMS if form != DENSE))))


def _names(bases: Sequence[str], widths: Sequence[int], section: Quantize | None) -> tuple[str, ...]:
    return () if section is None else tuple(rounded(b, bits, section.group_size).name for bits in widths for b in bases)


def _kept(section: Quantize, plan: Plan, model: Any) -> Iterator[tuple[Target, Rounded]]:
    """The weights that few bits will hold, each with its storage as planned, or as `storage: keep` has it."""
    group = section.group_size
    for target in planned_targets(plan, model, section.what):
        form = plan.forms.get(target.name) if plan.budget else rounded(target.storage, section.widths[-1], group).name
        if form is not None and is_even(storage := named(form), target):
            yield target, storage
    for end in planned_ends(plan, model) if section.what == "all" else ():
        storage = rounded(end.storage, section.embedding, group)
        if is_even(storage, end):
            yield end, storage


def checkpoint_bytes(section: Quantize, plan: Plan, model: Any, each: int, most: bool = False) -> int:
    """Bytes of the weights in few bits, the others' with `each` for a number.

    With `most`, every weight in the largest form that it might take. Of a plan in bytes what it says.
    """
    if plan.budget is not None and plan.bytes is not None:
        return max(plan.bytes, plan.budget.most) if most else plan.bytes
    total = each * plan.after
    for target, storage in _kept(section, plan, model):
        if target.tied:
            continue
        numbers = target.matrix[0] * target.matrix[1]
        if target.storage != DENSE:
            numbers = storage.base.numbers(*target.matrix, target.rank)
        forms = [storage]
        if most and section.fitted and section.storage == "auto" and target.storage != DENSE:
            forms += [rounded(base, storage.bits, section.group_size) for base in FORMS]
        held = max(matrix_bytes(form, target.matrix, target.rank, each) for form in forms)
        total += target.copies * (held - each * numbers)
    return total


def moments_bytes(section: Quantize, plan: Plan, model: Any) -> tuple[int, int]:
    """(how often the model runs over the data, bytes of the moments that are there at once, a weight's twice)."""
    if not section.fitted:
        return 0, 0
    wanted = [Wanted(t.name, t.kind, t.shape) for t in planned_targets(plan, model, section.what)]
    together = [[one.bytes for one in some] for some in passes(wanted)]
    return len(together), max((sum(some) + max(some) for some in together), default=0)


def memory(counts: Counts, kept_per_token: int, logits_per_token: int) -> int:
    """Bytes on the working device: the model in float32, and a batch that runs through it, or a weight being rounded.

    `kept_per_token` is what a forward pass keeps for its gradients, `logits_per_token` what predictions take. Moments
    are on the host.
    """
    section, plan, model = counts.recipe.quantize, counts.plan, counts.source.model
    if section is None:
        return 0
    found = [target for target, _ in _kept(section, plan, model)]
    largest = max((math.prod(t.matrix) for t in found), default=0)
    rounding = 4 * ROUNDING * largest
    batch, held = 0, 0
    if section.fitted:
        widest = max((max(t.matrix) for t in planned_targets(plan, model, section.what)), default=0)
        rounding += 8 * SQUARES * widest**2
        batch = counts.batch * (kept_per_token + logits_per_token)
        held = moments_bytes(section, plan, model)[1] if counts.device.device.type == "cpu" else 0
    return 4 * plan.after + held + max(batch, rounding)


def operations(counts: Counts) -> float:
    """Floating-point operations: the model forwards and back, moments, and rounding in every form that is tried."""
    section, plan, model = counts.recipe.quantize, counts.plan, counts.source.model
    if section is None:
        return 0.0
    learned = section.steps * learned_tokens(counts.recipe) * (6.0 * plan.after + 2.0 * plan.before)
    if not section.fitted:
        return learned
    tokens = min(counts.recipe.calibration.known_tokens or section.tokens, section.tokens)
    often, _ = moments_bytes(section, plan, model)
    found = planned_targets(plan, model, section.what)
    sums = sum(2 * (t.matrix[0] ** 2 + t.matrix[1] ** 2) * min(t.copies, counts.chosen) for t in found)
    once = 0.0
    for target in found:
        forms = 3 if section.storage == "auto" and target.storage != DENSE else 1
        d_out, d_in = target.matrix
        squares, products = d_in**3 + d_out**3, 6.0 * d_in + 2.0 * d_out
        once += target.copies * forms * (8.0 * squares + products * d_out * d_in)  # in float64, and in float32
    return learned + tokens * (often * 4 * plan.after + sums) + once


def learned_tokens(recipe: Recipe) -> int:
    """Tokens of an update around the rounding (see run/learn.py); 0 where only a plugin knows its examples."""
    section = recipe.finetune
    if section is None:
        return 512  # one sequence, of Finetune's own length
    return section.batch_size * section.gradient_accumulation * section.sequence_length
