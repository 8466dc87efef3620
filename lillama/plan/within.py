"""Ranks and bits together, for a number of bytes (`compress.size`): what costs the model's predictions least.

Every weight may be kept in several ways: dense or at some rank, in a form, in so many bits. Each takes bytes and costs
nats per token: what the components left out are worth (the tail of the spectrum), and what rounding loses. Of dense
weights that was foretold from the data (factorise/rounding.py); of the forms of low rank it follows from the spectrum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.lowrank.counts import stored
from lillama.lowrank.whole import NAME as DENSE
from lillama.plan.budget import Budget, Measured, bits_of, dense_form, is_even
from lillama.plan.fisher import tails
from lillama.plan.hull import steps
from lillama.plan.plan import UNUSED, Plan, rank_multiple, skipped
from lillama.recipe.schema import Compress

# What rounding to 4 bits, groups of 32, really lost on 35 weights of SmolLM2-135M, over what was foretold
# (docs/results/bits.md). Of dense ones the median over `dense_cost`, whose scales are not refitted; of forms of low
# rank the sums over (sum S)^2 / r, with S the singular values that are kept (ranks of 30, 60 and 85 %): errors of both
# factors, once they are balanced, matter as the mean of S.
DENSE_LOSS = 0.83
FORM_LOSS = {"factors": 0.0037, "pivoted": 0.0126}
OTHER_LOSS = 0.0126  # of a plugin's format nothing is known: the worst of these
STEPS = 16.0  # the step of 4 bits over that of 8


@dataclass(frozen=True)
class Option:
    """One way to keep a weight: `rank` (None: dense), in which storage, for how many bytes and nats per token."""

    rank: int | None
    form: str
    bytes: int
    loss: float


def choose_within(
    layers: Sequence[Layer], before: int, compress: Compress, budget: Budget, measured: Measured | None = None
) -> Plan:
    """The plan whose last checkpoint takes at most the bytes of `budget`, at the least loss that is foretold.

    Without `measured` a provisional plan, in which every weight counts by its size alone. A weight that nothing was
    measured of stays dense in the most bits that it may get. Raises LillamaError with the smallest possible size.
    """
    compress = compress.model_copy(update={"rank_multiple": rank_multiple(layers, compress)})
    weights = [w for layer in layers for w in layer.weights if not w.tied]
    stay = {w.tied for layer in layers for w in layer.weights if w.tied and skipped(w, compress.skip)}
    stay |= {w.name for w in weights if skipped(w, compress.skip)}
    known = measured or _stand_in(weights)
    found = {w.name: options(w, compress, budget, known, dense=w.name in stay) for w in weights}
    room = budget.most - budget.outside
    smallest = sum(each[0].bytes for each in found.values())
    if smallest > room:
        raise _too_small(budget, budget.outside + smallest, compress)
    kept = choose(found, room)
    ranks = {name: option.rank for name, option in kept.items() if option.rank is not None}
    tied = {w.name: ranks[w.tied] for layer in layers for w in layer.weights if w.tied in ranks}
    forms = {name: option.form for name, option in kept.items() if bits_of(option.form)}
    unused = {w.name: UNUSED for w in weights if w.name not in known.spectra and w.name not in stay}
    plan = Plan(
        tuple(layers), ranks | tied, compress.storage, before, compress.strategy, measured is None, {}, forms, budget
    )
    return plan.keep_dense(unused) if unused else plan


def options(weight: Weight, compress: Compress, budget: Budget, known: Measured, dense: bool = False) -> list[Option]:
    """The ways to keep a weight that are worth their bytes: the more of these, the less loss. `dense`: without ranks.

    Of a weight that nothing is known of there is one, dense in the most bits.
    """
    spectrum, whole = known.spectra.get(weight.name), budget.dense[weight.name]
    if spectrum is None:
        return [_option(weight, None, whole[-1], 0.0, budget)]
    lost = known.rounding.get(weight.name, 0.0) * DENSE_LOSS
    found = [_option(weight, None, form, lost * _share(form), budget) for form in whole]
    if not dense:
        found += _ranked(weight, compress, budget, spectrum)
    return _worth_it(found)


def _ranked(weight: Weight, compress: Compress, budget: Budget, spectrum: Sequence[float]) -> list[Option]:
    """Every rank that saves numbers, and as many as the recipe asks for, in every form."""
    tail, step, found = tails(spectrum), int(compress.rank_multiple), []
    kept = list(itertools.accumulate((math.sqrt(value) for value in spectrum), initial=0.0))
    most = weight.parameters * (1 - compress.keep_dense_below)
    whole = {form: _as_dense(weight, form, budget) for form in budget.ranked[weight.name]}
    for rank in range(step, min(weight.shape), step):
        numbers = stored(weight, rank, compress.storage)
        if numbers >= weight.parameters or numbers > most:
            continue
        for form, fewest in whole.items():
            option = _option(weight, rank, form, tail[rank], budget)
            if option.bytes < fewest and is_even(weight, rank, form):
                base = form.partition(":")[0]
                lost = FORM_LOSS.get(base, OTHER_LOSS) * kept[rank] ** 2 / rank * _share(form)
                # An embedding's rounding is not weighed: every rank of it is rounded alike.
                lost = 0.0 if weight.kind == "embedding" else lost
                found.append(replace(option, loss=option.loss + lost))
    return found


def _as_dense(weight: Weight, form: str, budget: Budget) -> int:
    """Bytes of the weight when it is dense in as many bits, or in full where few bits hold no dense one."""
    dense = dense_form(weight, form)
    return budget.bytes(weight, None, dense if dense in budget.dense[weight.name] else DENSE)


def _option(weight: Weight, rank: int | None, form: str, loss: float, budget: Budget) -> Option:
    return Option(rank, form, budget.bytes(weight, rank, form), loss)


def _share(form: str) -> float:
    """What rounding loses in this form's bits, over what it would in 4: the square of the steps' ratio."""
    return {None: 0.0, 4: 1.0, 8: STEPS**-2}[bits_of(form)]


def _worth_it(found: Sequence[Option]) -> list[Option]:
    """Those that no other one has both in bytes and in loss; rising in bytes."""
    kept: list[Option] = []
    for option in sorted(found, key=lambda one: (one.bytes, one.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def choose(found: Mapping[str, Sequence[Option]], room: int) -> dict[str, Option]:
    """Options that take at most `room` bytes, starting from the smallest of each: the more room, the less loss.

    The steps along every weight's convex hull are taken in the order of what they save per byte, as far as the room
    goes. So no other choice of so many bytes costs less. The step that would be next gives place to the best that still
    fits, of the same weight: of others, more room might make the whole worse.
    """
    kept = {name: each[0] for name, each in found.items()}
    spare = room - sum(option.bytes for option in kept.values())
    for name, after in steps(found, lambda option: option.bytes):
        cost = after.bytes - kept[name].bytes
        if cost > spare:
            fitting = [option for option in found[name] if option.bytes - kept[name].bytes <= spare]
            kept[name] = min(fitting, key=lambda option: option.loss)
            break
        kept[name] = after
        spare -= cost
    return kept


def _stand_in(weights: Sequence[Weight]) -> Measured:
    """As if components of all weights fell alike, and 4 bits cost a little, by the number of parameters."""
    spectra, rounding = {}, {}
    for weight in weights:
        most = min(weight.shape)
        spectra[weight.name] = [4.0 * weight.parameters * (most - i) / most**2 for i in range(most)]
        rounding[weight.name] = 0.01 * weight.parameters
    return Measured(spectra, rounding)


def _too_small(budget: Budget, smallest: int, compress: Compress) -> LillamaError:
    possible = math.ceil(smallest / budget.before * 1e4) / 1e4
    return LillamaError(
        f"no ranks and bits reach {compress.size:g} of the original's {budget.before:,} bytes: "
        f"the smallest possible is {possible:g}, {smallest:,} bytes",
        where="compress.size",
        hint="Lower compress.rank_multiple, ask for more, skip fewer weights, or count with fewer bits (quantize.bits: "
        "4, quantize.what: all).",
    )
