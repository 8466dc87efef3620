"""A compressed model in memory put into few bits: which of its matrices, in which form, and rounded how.

A weight of low rank may stay in the form that it has, or take another that holds the same matrix (two factors, pivot
rows, all numbers): in few bits these differ in bytes and in what rounding costs, and by more than in full. `storage:
auto` takes the form with the least loss + price x bytes. The price is what the rank itself was worth: what leaving out
one more component would cost, over the bytes that it would save. Where the plan counted bytes, it says how many each
weight may take and in how many bits; then the form that loses least of those that fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lillama.bits.moments import Moments, Reading, Wanted, gather
from lillama.bits.targets import Target, find_ends, forms, is_even, put
from lillama.bits.weights import least_component, round_matrix
from lillama.lowrank import swap
from lillama.lowrank.counts import SCALE, matrix_bytes
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.storage import get_storage, rounded
from lillama.lowrank.whole import NAME as DENSE
from lillama.pretrained import sharing
from lillama.recipe.schema import Quantize

FORMS = ("factors", DENSE)  # besides the one that a weight has


@dataclass(frozen=True)
class Choice:
    """What became of a weight: the `storage` it is kept in now (None: as it was), and what rounding it costs.

    The cost is in nats per token, by the moments; None where they were not asked for.
    """

    target: Target
    storage: str | None
    loss: float | None = None


@dataclass
class Planned:
    """What a plan in bytes says: the storage in few bits of every weight that gets one, and the bytes left over."""

    forms: Mapping[str, str]
    spare: int = 0


@dataclass(frozen=True)
class _Tried:
    storage: Rounded
    tensors: dict[str, Tensor]
    loss: float | None


def quantise_(
    model: Any, targets: Sequence[Target], how: Quantize, reading: Reading | None, plan: Planned | None = None
) -> list[Choice]:
    """Keep `targets` of `model` in few bits, in place; what became of each.

    `reading` None: every number is rounded for itself. `plan` says how, where bytes were planned; `how.bits` may be
    `auto` then. Raises LillamaError where nothing can be known of the weights.
    """
    if plan is None:
        served = [t for t in targets if is_even(_rounded(t.storage, how), t)]
    else:
        served = [t for t in targets if t.name in plan.forms and is_even(named(plan.forms[t.name]), t)]
    done = {t.name: Choice(t, None) for t in targets if t not in served}
    for target, known in _known(model, served, reading):
        best = _best(model, target, how, known) if plan is None else _fitting(model, target, how, known, plan)
        put(model, target, best.storage, best.tensors)
        done[target.name] = Choice(target, best.storage.name, best.loss)
    return [done[target.name] for target in targets]


def quantise_ends_(model: Any, bits: int, group: int) -> list[Choice]:
    """Keep the embedding and the head in so many bits, every number rounded for itself; one set where they are tied."""
    done = []
    for target in find_ends(model):
        storage = rounded(target.storage, bits, group)
        if not is_even(storage, target):  # nor is a head that is tied to it
            done.append(Choice(target, None))
            continue
        if target.tied:
            leaves = swap.replace_tied(model, target.name, target.tied, storage.name, target.rank)
            same = {f"{target.name}.{leaf}": f"{target.tied}.{leaf}" for leaf in leaves}
            held = [f"{target.name}.{leaf}" for leaf in ("weight", *storage.base.parameters)]
            sharing.tell(model, same, gone=held)
        else:
            tensors = forms(model, target, [target.storage])[target.storage]
            put(model, target, storage, round_matrix(storage, tensors, None))
        done.append(Choice(target, storage.name))
    return done


def _known(model: Any, targets: Sequence[Target], reading: Reading | None) -> Iterator[tuple[Target, Moments | None]]:
    if reading is None:
        yield from ((target, None) for target in targets)
        return
    by_name = {target.name: target for target in targets}
    for one, moments in gather(model, [Wanted(t.name, t.kind, t.shape) for t in targets], reading):
        yield by_name[one.name], moments


def _rounded(base: str, how: Quantize) -> Rounded:
    return rounded(base, how.widths[-1], how.group_size)


def named(form: str) -> Rounded:
    """The format in few bits of this name."""
    storage = get_storage(form)
    assert isinstance(storage, Rounded)
    return storage


def _bytes(storage: Rounded, target: Target) -> int:
    return target.copies * storage.bytes(*target.matrix, target.rank, SCALE)


def _best(model: Any, target: Target, how: Quantize, known: Moments | None) -> _Tried:
    """The form that loss and bytes speak for."""
    bases = [target.storage]
    if how.storage == "auto" and known is not None and target.storage != DENSE:
        bases += [base for base in FORMS if base != target.storage and is_even(_rounded(base, how), target)]
        most = _bytes(_rounded(DENSE, how), target)  # what takes more than all numbers is of no use
        bases = [base for base in bases if base == DENSE or _bytes(_rounded(base, how), target) < most] or [DENSE]
    tried = [_try(_rounded(base, how), target, held, known) for base, held in forms(model, target, bases).items()]
    if len(tried) == 1 or known is None:
        return tried[0]
    price = _price(model, target, known, how)

    def cost(one: _Tried) -> float:
        return (one.loss or 0.0) + price * _bytes(one.storage, target)

    return min(tried, key=cost)


def _fitting(model: Any, target: Target, how: Quantize, known: Moments | None, plan: Planned) -> _Tried:
    """The form that loses least, of those that take no more bytes than the plan has for the weight, or are to spare."""
    planned = named(plan.forms[target.name])
    wanted = {planned.base.name: planned}
    if how.storage == "auto" and known is not None and target.storage != DENSE:
        wanted |= {base: rounded(base, planned.bits, planned.group) for base in (target.storage, *FORMS)}
    held = {base: target.copies * matrix_bytes(one, target.matrix, target.rank, 0) for base, one in wanted.items()}
    most = held[planned.base.name] + plan.spare
    bases = [base for base, one in wanted.items() if held[base] <= most and is_even(one, target)]
    tried = [_try(wanted[base], target, given, known) for base, given in forms(model, target, bases).items()]
    best = min(tried, key=lambda one: one.loss or 0.0)
    plan.spare = most - held[best.storage.base.name]
    return best


def _try(storage: Rounded, target: Target, tensors: Mapping[str, Tensor], known: Moments | None) -> _Tried:
    """A weight rounded in one form, and the cost."""
    if len(target.shape) == 2:
        now = round_matrix(storage, dict(tensors), known)
        return _Tried(storage, now, None if known is None else _loss(storage, tensors, now, known))
    each = []
    for copy in range(target.copies):
        one = Target(target.name, target.kind, target.shape[1:], target.rank, target.storage)
        each.append(_try(storage, one, _of(tensors, copy), None if known is None else known.of_copy(copy)))
    stacked = {suffix: torch.stack([one.tensors[suffix] for one in each]) for suffix in each[0].tensors}
    return _Tried(storage, stacked, None if known is None else sum(one.loss or 0.0 for one in each))


def _of(tensors: Mapping[str, Tensor], copy: int) -> dict[str, Tensor]:
    return {suffix: tensor[copy] for suffix, tensor in tensors.items()}


def _loss(storage: Rounded, tensors: Mapping[str, Tensor], now: Mapping[str, Tensor], known: Moments) -> float:
    """1/2 tr(G E H E^T) of the error E that rounding leaves."""
    base = storage.base
    W = base.product(dict(tensors), base.derive(dict(tensors))).float()
    there = {suffix: tensor.to(W.device) for suffix, tensor in now.items()}
    E = storage.product(there, storage.derive(there)).float() - W
    G, H = known.outputs.to(E.device), known.inputs.to(E.device)
    return float(((G @ E @ H) * E).sum()) / 2


def _price(model: Any, target: Target, known: Moments, how: Quantize) -> float:
    """Nats per byte: what the least component of a weight is worth, over the bytes that leaving it out would save."""
    A, B = (factor.detach().float() for factor in swap.factors(model, target.name, target.kind))
    if A.dim() == 2:
        worth = least_component(A, B, known)
    else:
        worth = sum(least_component(*both, known.of_copy(i)) for i, both in enumerate(zip(A, B)))
    storage, (d_out, d_in) = _rounded(target.storage, how), target.matrix
    less = max(target.rank - 8, 1)
    saved = storage.bytes(d_out, d_in, target.rank, SCALE) - storage.bytes(d_out, d_in, less, SCALE)
    return worth / max(target.copies * saved / max(target.rank - less, 1), 1)
