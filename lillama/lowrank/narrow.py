"""Linears of fewer rows or columns than the original's: what is left where neurons of an MLP are removed.

Such a linear is an ordinary `nn.Linear`, or a factor module of that shape: nothing else in the model changes. Written
dense in full it has the original's shape again, zeros in place of the neurons, which give the exit of the MLP nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lillama.errors import LillamaError

Shapes = Mapping[str, Sequence[int]]  # (d_out, d_in) by the name of the linear's module
MARK = "_loses_neurons"


def narrow(
    root: nn.Module, name: str, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> nn.Linear:
    """Put an `nn.Linear` of `shape` in place of the one called `name` below `root`, and return it.

    It has a bias where that has one, and its numbers are of the same type. Those that are not given are not filled, and
    on the device of the old ones. Raises LillamaError where there is no `nn.Linear` of this size or a larger one.
    """
    old = root.get_submodule(name)
    check_larger(old, shape, name)
    assert isinstance(old, nn.Linear)
    d_out, d_in = shape
    new = nn.Linear(d_in, d_out, old.bias is not None, device="meta", dtype=old.weight.dtype)
    for leaf, given in (("weight", weight), ("bias", bias)):
        kept: Any = getattr(old, leaf)
        if kept is None:
            continue
        like = getattr(new, leaf)
        values = torch.empty_like(like, device=kept.device) if given is None else given.to(kept.dtype)
        setattr(new, leaf, nn.Parameter(values, requires_grad=False))
    setattr(new, MARK, True)
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new.train(old.training))
    return new


def loses_neurons(module: nn.Module) -> bool:
    """Whether `module` is a dense linear that `narrow` made."""
    return bool(getattr(module, MARK, False))


def check_larger(old: nn.Module, shape: Sequence[int], name: str) -> None:
    """LillamaError unless `old`, called `name`, is an `nn.Linear` of this shape or a larger one."""
    if type(old) is not nn.Linear:
        raise LillamaError(f"only an nn.Linear loses neurons, and this is a {type(old).__name__}", where=name)
    if not (0 < shape[0] <= old.out_features and 0 < shape[1] <= old.in_features):
        found = f"{old.out_features} x {old.in_features}"
        raise LillamaError(f"no {' x '.join(map(str, shape))} can be left of a weight of {found}", where=name)


def widened(linear: nn.Linear, shape: Sequence[int]) -> nn.Linear:
    """The same linear with zeros up to `shape`, in rows and columns behind its own."""
    rows, columns = shape[0] - linear.out_features, shape[1] - linear.in_features
    weight = linear.weight.detach()
    new = nn.Linear(shape[1], shape[0], linear.bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(nn.functional.pad(weight, (0, columns, 0, rows)), requires_grad=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(nn.functional.pad(linear.bias.detach(), (0, rows)), requires_grad=False)
    return new.train(linear.training)
