"""Modules that are one and the same object, and parameters that are: kept so from the skeleton to the saved file.

A group of shared modules is a list of names in the model; the first is the one that a checkpoint holds. transformers
knows tied parameters only: the names of the others are told to it, so that it neither misses them in a file nor writes
them twice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lillama.errors import LillamaError

Groups = Sequence[Sequence[str]]


def share(model: nn.Module, groups: Groups) -> None:
    """Put the first module of every group in the place of the others."""
    for first, *others in groups:
        module = model.get_submodule(first)
        for name in others:
            parent, _, child = name.rpartition(".")
            theirs = {key: tuple(p.shape) for key, p in model.get_submodule(name).named_parameters()}
            if theirs != {key: tuple(p.shape) for key, p in module.named_parameters()}:
                raise LillamaError(f"'{name}' and '{first}' cannot be shared: their parameters differ in shape")
            setattr(model.get_submodule(parent), child, module)


def aliases(model: nn.Module, groups: Groups) -> dict[str, str]:
    """Every further name of a shared parameter -> the name a checkpoint holds it under."""
    found: dict[str, str] = {}
    for first, *others in groups:
        names = [name for name, _ in model.get_submodule(first).named_parameters()]
        found |= {f"{other}.{name}": f"{first}.{name}" for other in others for name in names}
    return found


def tell(model: Any, same: Mapping[str, str], gone: Sequence[str] = ()) -> None:
    """Tell transformers which parameters are the same (name -> the one that is stored); `gone` no longer exist."""
    kept = {k: v for k, v in (getattr(model, "_tied_weights_keys", None) or {}).items() if k not in gone}
    model._tied_weights_keys = kept | dict(same)
    known = {k: v for k, v in model.all_tied_weights_keys.items() if k not in gone}
    model.all_tied_weights_keys = known | dict(same)


def untell(model: Any) -> None:
    """Undo `tell`: what is tied is what the model's class and configuration say."""
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def unshare(model: nn.Module, groups: Groups) -> None:
    """Give every name of a group a module of its own again."""
    for first, *others in groups:
        for name in others:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(model.get_submodule(first)))
