"""`lillama plugins trace`: what tracing finds in a model, said to a person and written as a plugin."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lillama.contract import Layer, Weight, relative

Signature = tuple[tuple[str, ...], ...]  # the weights of a block by common input, by names relative to the block


def traced(model: str, trust: bool = False) -> tuple[Any, list[Layer], str]:
    """The skeleton of a model (a directory or a hub id), the layers that tracing finds, and its auto class' name."""
    from lillama.pretrained.trace import trace
    from lillama.recipe.schema import Recipe
    from lillama.run.prepare import open_source

    settings = {
        "model": {"id": model, "trust_remote_code": trust},
        "compress": {"reduction": 0.1},
        "calibration": {"dataset": "unused"},
        "run": {"out": "unused"},
    }
    source = open_source(Recipe.parse(settings))
    return source.model, trace(source.model), source.auto_class.__name__


def summary(layers: Sequence[Layer]) -> str:
    """The layers for a person to read: those that are alike together, with their weights by common input."""
    lines = [f"{len(layers)} layers, in the order in which the model runs them:"]
    for name, run in runs(layers):
        alike: dict[Any, list[Layer]] = defaultdict(list)
        for layer in run:
            alike[layer.kind, tuple((relative(w, layer), w.shape, w.copies) for w in layer.weights)].append(layer)
        for (kind, _), same in alike.items():
            where = same[0].name if name is None else f"{name}.{_numbers(same)}"
            what = kind if name is None else f"{len(same)} {kind}{'' if len(same) == 1 else 's'}"
            lines.append(f"{where} ({what}{'' if same[0].weights else ', passed through'})")
            lines += [f"  {' + '.join(map(_said, group))}" for group in grouped(same[0])]
            lines += [f"  neurons: {' + '.join(mlp.entries)} -> {mlp.exit}" for mlp in same[0].neurons]
    return "\n".join(lines)


def _said(weight: Weight) -> str:
    shape = " x ".join(map(str, (weight.copies, *weight.shape) if weight.kind == "experts" else weight.shape))
    return f"{weight.name} [{shape}]{f', tied to {weight.tied}' if weight.tied else ''}"


def _numbers(layers: Sequence[Layer]) -> str:
    """The last parts of the layers' names, 0-3,5 for 0, 1, 2, 3 and 5."""
    numbers = [int(layer.name.rpartition(".")[2]) for layer in layers]
    parts = []
    for _, pairs in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in pairs]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(parts)


def runs(layers: Sequence[Layer]) -> Iterator[tuple[str | None, list[Layer]]]:
    """(name of the list, its modules) for numbered layers that follow one another; (None, [layer]) for one alone."""

    def stack(layer: Layer) -> str | None:
        found = re.fullmatch(r"(.+)\.\d+", layer.name)
        return found[1] if found and layer.kind == "block" else None

    for name, run in groupby(layers, stack):
        if name is None:
            yield from ((None, [layer]) for layer in run)
        else:
            yield name, list(run)


def grouped(layer: Layer) -> list[list[Weight]]:
    """The weights of a layer by common input, in their order."""
    found: dict[str, list[Weight]] = {}
    for weight in layer.weights:
        found.setdefault(weight.group or weight.name, []).append(weight)
    return list(found.values())


def same_layers(first: Sequence[Layer], second: Sequence[Layer]) -> bool:
    """Whether two lists of layers say the same, whatever their groups are called and in whatever order they stand."""

    def said(layer: Layer) -> Any:
        groups = {frozenset(w.name for w in group) for group in grouped(layer)}
        weights = {(w.name, w.shape, w.copies, w.kind, w.tied) for w in layer.weights}
        return layer.name, layer.kind, weights, groups

    return list(map(said, first)) == list(map(said, second))
