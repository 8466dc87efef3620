"""Storage formats by name. What a format is, format.py says; the names are those of registry.py and of plugins."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lillama.errors import LillamaError
from lillama.lowrank.format import ONE_MATRIX as ONE_MATRIX  # for whoever writes a format
from lillama.lowrank.format import Factors as Factors
from lillama.lowrank.format import Products as Products
from lillama.lowrank.format import Storage as Storage
from lillama.lowrank.format import Tensors as Tensors
from lillama.lowrank.rounded import Rounded, read_name
from lillama.lowrank.whole import NAME, DenseStorage
from lillama.registry import STORAGES


@functools.cache
def _storage(cls: type[Storage], name: str) -> Storage:
    storage = cls()
    storage.name = name
    return storage


@functools.cache
def rounded(base: str, bits: int, group: int) -> Rounded:
    """The format `base` in few bits, which `get_storage` knows as `base:bits:group`; `dense` is one here."""
    return Rounded(_storage(DenseStorage, NAME) if base == NAME else get_storage(base), bits, group)


def get_storage(name: str) -> Storage:
    """The format registered as `name`, or one in few bits (`pivoted:4:32`, rounded.py).

    Raises LillamaError, with the nearest name, where there is none.
    """
    if (parts := read_name(name)) is not None:
        base, bits, group = parts
        return rounded(base, bits, group)
    cls: Any = STORAGES.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Storage)):
        raise LillamaError(
            f"the storage '{name}' is {cls!r}, no subclass of lillama.lowrank.storage.Storage",
            hint="Register the class itself.",
        )
    return _storage(cls, name)


def empty_tensors(storage: Storage, shape: tuple[int, ...], rank: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors for a matrix of `shape` (d_out, d_in), or (copies, d_out, d_in), by suffix; `options`: device, dtype.

    Parameters are left unfilled. Indices count from 0, so that what is derived of them is valid before they are known.
    """
    *copies, d_out, d_in = shape
    found: dict[str, Tensor] = {}
    for suffix, size in storage.shapes(d_out, d_in, rank).items():
        if suffix in storage.indices:
            kind, device = storage.index_type(suffix), options.get("device")
            # Few bits hold no such numbers, and nothing is derived of them.
            if kind == torch.int64:
                counting = torch.arange(math.prod(size), device=device).view(size)
            else:
                counting = torch.zeros(size, dtype=kind, device=device)
            found[suffix] = counting.repeat(*copies, *[1] * len(size)) if copies else counting
        else:
            found[suffix] = torch.empty(*copies, *size, **options)
    return found
