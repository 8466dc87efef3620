"""A student layer made of its teacher: empty factor modules in a copy, and what is stored of it in the end."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lillama.base.finite import fits
from lillama.contract import Layer, relative
from lillama.errors import LillamaError
from lillama.lowrank import swap
from lillama.lowrank.fit import make_fit
from lillama.lowrank.narrow import loses_neurons, narrow
from lillama.plan.plan import Plan

Left = Mapping[str, Mapping[str, Tensor]]  # statistics.read_narrow: of weights that lose neurons, what is left of them
NONE: Left = {}


def build_layer(layer: Layer, teacher: nn.Module, plan: Plan, storage: str, left: Left = NONE) -> nn.Module:
    """A float32 copy of the teacher with empty factor modules where the plan has them.

    `left` is what weights that lose neurons are made of.
    """
    device = next(teacher.parameters()).device
    planned = [(relative(weight, layer), weight) for weight in plan.planned(layer)]
    narrowed = [(relative(weight, layer), weight) for weight in plan.narrowed(layer)]
    # What the factors replace is not copied: hollow parameters stand in until they go.
    gone = swap.leaving(teacher, [(path, weight.kind) for path, weight in dict([*planned, *narrowed]).items()])
    hollow: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in gone}
    student = copy.deepcopy(teacher, hollow).float().eval()
    for path, weight in narrowed:
        held = left[weight.name]
        dense = None if weight.name in plan.ranks else held["matrix"].to(device)
        narrow(student, path, weight.shape, dense, held["bias"].to(device) if "bias" in held else None)
    for path, weight in planned:
        rank = plan.ranks[weight.name]
        new = swap.replace(student, path, kind=weight.kind, storage=storage, rank=rank, device=device)
        student = student if path else new
    return student.requires_grad_(False)


def restore_layer(
    layer: Layer, teacher: nn.Module, plan: Plan, tensors: dict[str, Tensor], left: Left = NONE
) -> nn.Module:
    """The finished student layer from its stored tensors (named inside the layer), the rest from its teacher."""
    student = build_layer(layer, teacher, plan, plan.storage, left)
    missing, unexpected = student.load_state_dict(tensors, strict=False)
    if troubles := [*unexpected, *(name for name in missing if in_factors(student, name))]:
        raise LillamaError(f"the stored layer does not fit the plan: {troubles[0]}", where=layer.name)
    return student


def tensors_of(module: nn.Module, trained: Container[str]) -> dict[str, Tensor]:
    """What is stored of a finished layer: its factor modules, what lost neurons, and all else that was trained."""
    state = module.state_dict()
    return {name: t.detach() for name, t in state.items() if name in trained or in_factors(module, name)}


def in_factors(module: nn.Module, name: str) -> bool:
    """Whether the parameter or buffer `name` of `module` belongs to a factor module, or to what lost neurons."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return swap.is_factorised(owner) or loses_neurons(owner)


def without(
    layer: Layer, teacher: nn.Module, plan: Plan, finished: nn.Module, trained: Container[str], left: Left = NONE
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A finished layer with the weights dense that `plan` has no rank for, and what is stored of it.

    Where it has a rank for none, and no neurons go, that is the teacher.
    """
    if not plan.changes(layer):
        return teacher, {}
    student = build_layer(layer, teacher, plan, plan.storage, left)
    fitting = student.state_dict()
    given = {
        n: t for n, t in finished.state_dict().items() if n in fitting and (n in trained or in_factors(student, n))
    }
    student.load_state_dict(given, strict=False)
    return student, tensors_of(student, trained)


def find_unfit(
    module: nn.Module, layer: Layer, plan: Plan, trained: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, str]:
    """The planned weights of a student layer that would not be finite in the checkpoint's type, with the reasons.

    Factors are rescaled where that is enough. All weights of the layer depend on the other parameters that learned.
    """
    said = f"is not finite in {str(dtype).removeprefix('torch.')}"
    planned = [weight for weight in plan.planned(layer) if not weight.tied]
    for name, parameter in trained.items():
        if not swap.is_factor(module, name) and not fits(parameter, dtype):
            return {weight.name: f"{name} {said}" for weight in planned}
    return {
        weight.name: f"what it learned {said}"
        for weight in planned
        if not make_fit(module, relative(weight, layer), weight.kind, plan.storage, dtype)
    }
