"""Rank strategies that need no measurement: Algorithm 1 from either end, and the same share of every weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.lowrank.counts import largest_rank, stored
from lillama.recipe.schema import Compress

Ranks = dict[str, int]


def algorithm1(layers: Iterable[Layer], remove: int, compress: Compress) -> Ranks:
    """Algorithm 1: ranks k, k+m, ... in falling order, layer by layer, until the target size is met."""
    k, m = compress.min_rank, compress.rank_step
    candidates = []
    for position, layer in enumerate(layers):
        for weight in layer.weights:
            for rank in range(k, min(weight.shape), m):
                numbers = stored(weight, rank, compress.storage)
                if numbers < weight.parameters:
                    candidates.append((position, rank, numbers, weight))
    candidates.sort(key=lambda c: (c[0], -c[1]))  # stable: ties keep the order of the layer's weights
    ranks: Ranks = {}
    numbers_of: dict[str, int] = {}
    removed = 0
    for _, rank, numbers, weight in candidates:
        if removed >= remove:
            break
        removed += numbers_of.get(weight.name, weight.parameters) - numbers
        ranks[weight.name], numbers_of[weight.name] = rank, numbers
    if removed < remove:
        raise unreachable(removed, remove, "Lower compress.min_rank (and compress.rank_step)")
    return ranks


def bottom(layers: Sequence[Layer], remove: int, compress: Compress) -> Ranks:
    """Algorithm 1 as the paper has it: the layers nearest the input first."""
    return algorithm1(layers, remove, compress)


def top(layers: Sequence[Layer], remove: int, compress: Compress) -> Ranks:
    """Algorithm 1 with the layers reversed: the ones nearest the output first."""
    return algorithm1(list(layers)[::-1], remove, compress)


def uniform(layers: Sequence[Layer], remove: int, compress: Compress) -> Ranks:
    """The same share of every weight, as nearly as multiples of `rank_multiple` allow."""
    step, storage = int(compress.rank_multiple), compress.storage

    def shrinks(weight: Weight, rank: int) -> bool:
        return rank <= min(weight.shape) and stored(weight, rank, storage) < weight.parameters

    weights = [w for layer in layers for w in layer.weights if shrinks(w, step)]
    total = sum(w.parameters for w in weights)
    most = total - sum(stored(w, step, storage) for w in weights)
    if most < remove:
        raise unreachable(most, remove, "Lower compress.rank_multiple")
    if not weights:
        return {}
    keep = 1 - remove / total
    while True:
        ranks = {w.name: max(largest_rank(w, keep * w.parameters, storage, step), step) for w in weights}
        spare = total - remove - sum(stored(w, ranks[w.name], storage) for w in weights)
        if spare >= 0:
            break
        keep *= 0.99  # weights at the smallest rank gave less than their share
    # Rounding down removed a little too much: give it back where the rounding hurt most.
    for w in sorted(weights, key=lambda w: stored(w, ranks[w.name], storage) / w.parameters):
        cost = stored(w, ranks[w.name] + step, storage) - stored(w, ranks[w.name], storage)
        if cost <= spare and shrinks(w, ranks[w.name] + step):
            ranks[w.name] += step
            spare -= cost
    return ranks


def unreachable(most: int, remove: int, hint: str) -> LillamaError:
    """The error of a strategy that cannot remove `remove` parameters but at most `most`."""
    error = LillamaError(f"only {most:,} of the {remove:,} parameters to remove can be removed", hint=hint)
    error.most = most  # type: ignore[attr-defined]  # make_plan turns it into a reduction
    return error


Spectra = Mapping[str, Sequence[float]]
