"""Starting factors fitted one group of weights after the other, to the inputs that those before it leave (DESIGN 6).

For `init: compensated`: a weight's target is the original's output on the original's inputs, its own inputs are the
student's, so it makes up for what layers and weights before it lost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lillama.base import ranks
from lillama.contract import Weight, relative
from lillama.errors import LillamaError
from lillama.factorise.grams import counted
from lillama.factorise.known import WeightStatistics, refuse_unless_finite
from lillama.factorise.start import Initialiser, find_needs, initial_factors
from lillama.lowrank import swap
from lillama.lowrank.storage import Factors
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batch
from lillama.pretrained.walk import LayerPass
from lillama.recipe.schema import Recipe


def check_refits(plan: Plan, recipe: Recipe) -> None:
    """LillamaError where the recipe's initialiser wants these fits and cannot have them."""
    init = recipe.compress.init
    if "cross" not in find_needs(recipe).grams:
        return
    if recipe.distill.schedule != "sequential":
        raise LillamaError(
            f"init: {init} fits a layer to finished ones before it, which only the sequential schedule has",
            where="distill.schedule",
            hint="Use schedule: sequential, or init: whitened.",
        )
    for name in plan.ranks:
        if plan.weights[name].kind != "linear":
            raise LillamaError(
                f"init: {init} serves linear weights, and '{name}' is one of kind {plan.weights[name].kind}",
                where="compress.init",
                hint="Use init: whitened, or list it under compress.skip.",
            )


class _Reached(Exception):  # noqa: N818  no error: the rest of the layer need not run
    pass


def refit_layer(at: LayerPass, plan: Plan, initialise: Initialiser, limit: int) -> dict[str, Factors]:
    """The starting factors of a layer's planned weights, from the original's and the student's streams.

    Takes as many partial passes over up to `limit` tokens of the streams as the layer has groups of weights with the
    same input.
    """
    fitted = copy.deepcopy(at.teacher)
    groups: dict[str, list[Weight]] = {}
    for weight in plan.planned(at.layer):
        groups.setdefault(weight.group or weight.name, []).append(weight)
    found: dict[str, Factors] = {}
    for weights in groups.values():
        H, C = _moments(at, fitted, relative(weights[0], at.layer), limit)
        refuse_unless_finite(weights[0].name, H, C)
        known = {weight.name: WeightStatistics(gram=H, cross=C) for weight in weights}
        found |= initial_factors(at, plan, initialise, known, weights)
        for weight in (w for w in weights if w.name in found):  # the others stay dense
            W = swap.dense(fitted, relative(weight, at.layer), weight.kind)
            W.copy_(found[weight.name].A @ found[weight.name].B)
    return found


def _moments(at: LayerPass, fitted: nn.Module, path: str, limit: int) -> tuple[Tensor, Tensor]:
    """(X' X'^T, X X'^T) of the module at `path`, over up to `limit` tokens: its inputs X in the original, X' here."""
    H = C = torch.zeros(())
    seen = 0
    for batch, original, student in zip(at.batches, at.inputs["teacher"], at.inputs["student"]):
        if seen >= limit:
            break
        x = _input(at.teacher, path, batch, at.position, original)
        own = _input(fitted, path, batch, at.position, student)
        if not batch.counts:
            x, own = x[:0], own[:0]
        with torch.autocast(x.device.type, enabled=False):
            H, C = H.to(x.device) + own.T @ own, C.to(x.device) + x.T @ own
        seen += batch.tokens
    ranks.sum_([H, C])
    return H, C


def _input(module: nn.Module, path: str, batch: Batch, position: int, hidden: Tensor) -> Tensor:
    """What reaches the module at `path`, tokens x d_in in float32, padding left out."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = module.get_submodule(path).register_forward_pre_hook(take)
    try:
        batch.calls[position](module, hidden)
    except _Reached:
        pass
    finally:
        hook.remove()
    return counted(found[0], batch.calls[position].mask)
