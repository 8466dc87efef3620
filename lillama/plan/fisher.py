"""Ranks by what they cost the model's predictions (strategy `fisher`). No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.lowrank.counts import stored
from lillama.plan.hull import steps, worth
from lillama.plan.strategies import Ranks, unreachable
from lillama.recipe.schema import Compress


@dataclass(frozen=True)
class Choice:
    """One way to keep a weight: `rank` (None: dense), the `numbers` it holds, and the `loss` it costs."""

    rank: int | None
    numbers: int
    loss: float


def fisher(layers: Sequence[Layer], remove: int, compress: Compress, spectra: Mapping[str, Sequence[float]]) -> Ranks:
    """The ranks that cost least together by the spectra of sensitivity.py, in nats per token, for the size asked for.

    Every weight starts at its smallest rank. Then the steps that save most loss per number follow, along the lower
    convex hull of each weight's choices, so that a step is never worth more than the one before it; dense is the last
    step. Weights without a spectrum stay dense.
    """
    weights = [w for layer in layers for w in layer.weights if w.name in spectra]
    if not weights:
        raise LillamaError("no weight may be factorised", where="compress.skip", hint="Skip fewer.")
    found = {w.name: choices(w, spectra[w.name], compress) for w in weights}
    found = {name: options for name, options in found.items() if len(options) > 1}
    total = sum(w.parameters for w in weights if w.name in found)
    budget = total - remove
    kept = {name: options[0] for name, options in found.items()}
    spent = sum(choice.numbers for choice in kept.values())
    if spent > budget:
        raise unreachable(total - spent, remove, "Lower compress.rank_multiple")
    for name, after in steps(found, _numbers):
        cost = after.numbers - kept[name].numbers
        if cost > 0 and spent + cost <= budget:
            kept[name] = after
            spent += cost
    _spend(found, kept, budget - spent)
    return {name: choice.rank for name, choice in kept.items() if choice.rank is not None}


def choices(weight: Weight, spectrum: Sequence[float], compress: Compress) -> list[Choice]:
    """The ranks a weight may get, rising, and dense at the end. Ranks that save nothing are left out.

    So are those that save less than `keep_dense_below` where neurons may go in their place; elsewhere the plan takes
    them back one by one, and says of which weight (plan.py).
    """
    tail, step = tails(spectrum), int(compress.rank_multiple)
    least = 0.0 if compress.neurons is None else compress.keep_dense_below
    most = weight.parameters * (1 - least)
    numbers = {r: stored(weight, r, compress.storage) for r in range(step, min(weight.shape), step)}
    kept = [Choice(r, held, tail[r]) for r, held in numbers.items() if held < weight.parameters and held <= most]
    return [*kept, Choice(None, weight.parameters, 0.0)]


def tails(spectrum: Sequence[float]) -> list[float]:
    """tails[r]: what leaving out all but r components costs."""
    tail = [0.0]
    for value in reversed(spectrum):
        tail.append(tail[-1] + value / 2)
    return tail[::-1]


def _numbers(choice: Choice) -> int:
    return choice.numbers


def _spend(found: Mapping[str, Sequence[Choice]], kept: dict[str, Choice], spare: int) -> None:
    """Spend what whole steps left over on single ranks, the best first."""
    while True:
        better = [
            (worth(kept[name], option, _numbers), name, option)
            for name, options in found.items()
            for option in options
            if 0 < option.numbers - kept[name].numbers <= spare
        ]
        if not better:
            return
        _, name, option = max(better, key=lambda step: (step[0], step[1]))
        spare -= option.numbers - kept[name].numbers
        kept[name] = option
