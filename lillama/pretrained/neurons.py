"""MLPs whose neurons may be removed: found by the sizes of linears, and proven by removing half of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lillama.contract import Layer, Neurons, Weight, find_neurons, relative
from lillama.lowrank.narrow import narrow

Compute = Callable[[nn.Module], Tensor]  # what a model says of some inputs
Names = tuple[str, ...]  # the linears of an MLP by their names inside a block, the one that ends it last

TOLERANCE = 1e-5  # of the largest number, or absolute where that is below 1


def candidates(layer: Layer) -> list[Names]:
    """What might be the MLPs of a layer: linears with one input, and one behind them that reads what they put out."""
    found = []
    for last in layer.weights:
        groups: dict[str, list[Weight]] = {}
        for weight in layer.weights[: layer.weights.index(last)]:
            if weight.kind == "linear" and weight.shape[0] == last.shape[1] and weight.group != last.group:
                groups.setdefault(weight.group or weight.name, []).append(weight)
        found += [tuple(relative(w, layer) for w in (*group, last)) for group in groups.values()]
    return found


def with_neurons(
    model: nn.Module, layers: Sequence[Layer], small: nn.Module, blocks: Sequence[str], compute: Compute
) -> list[Layer]:
    """The layers of `model` with their MLPs: those that are proven to be such in the `blocks` of a `small` copy."""
    proven = prove(small, blocks, layers, compute)
    found = []
    for layer in layers:
        left, mlps = {weight.name for weight in layer.weights}, []
        for linears in proven:
            for mlp in find_neurons(model.get_submodule(layer.name), layer.name, linears):
                if left >= {*mlp.weights}:  # none is of two MLPs
                    mlps.append(mlp)
                    left -= {*mlp.weights}
        found.append(replace(layer, neurons=tuple(mlps)))
    return found


def prove(model: nn.Module, blocks: Iterable[str], layers: Sequence[Layer], compute: Compute) -> list[Names]:
    """Those of `candidates` of all `layers` that are MLPs wherever one of the `blocks` of `model` has such linears.

    `model` has numbers, and is left as it is; its blocks may be fewer than the layers.
    """
    blocks, proven = list(blocks), []
    for names in dict.fromkeys(one for layer in layers for one in candidates(layer)):
        mlps: list[Neurons] = []
        for block in blocks:
            mlps += find_neurons(model.get_submodule(block), block, names)
        try:
            if mlps and largest_change(copy.deepcopy(model), mlps, compute) <= 1:
                proven.append(names)
        except Exception:  # whatever a model says that lacks half of what it counts on: this is no MLP
            continue
    return proven


@torch.no_grad()
def largest_change(model: nn.Module, mlps: Iterable[Neurons], compute: Compute) -> float:
    """What half of the neurons of `mlps` change when they go, their exits not having read them before; 1: tolerated.

    `model` is changed. Where neurons depend on each other (by a norm between the linears, say), the half that is left
    computes something else.
    """
    mlps = list(mlps)
    for mlp in mlps:
        _linear(model, mlp.exit).weight[:, 1::2] = 0
    expected = compute(model)
    for mlp in mlps:
        _keep_every_second(model, mlp)
    found = compute(model)
    return float((found - expected).abs().max()) / (TOLERANCE * max(1.0, float(expected.abs().max())))


def _keep_every_second(model: nn.Module, mlp: Neurons) -> None:
    for name in mlp.weights:
        linear = _linear(model, name)
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if name == mlp.exit:
            weight = weight[:, ::2]
        else:
            weight, bias = weight[::2], None if bias is None else bias[::2]
        narrow(model, name, weight.shape, weight.clone(), None if bias is None else bias.clone())


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, no nn.Linear")
    return module
