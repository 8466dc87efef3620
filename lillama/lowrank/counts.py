"""How many numbers a low-rank weight holds, and how many bytes it takes in a checkpoint."""

from __future__ import annotations

import math

from lillama.contract import Weight
from lillama.lowrank.format import Storage
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.storage import get_storage
from lillama.lowrank.whole import NAME as DENSE

SCALE = 2  # bytes of a scale of numbers in few bits, whatever the type of the model


def stored(weight: Weight, rank: int, storage: str) -> int:
    """How many numbers a rank-`rank` version of `weight` holds (DESIGN 6). A tied weight holds nothing of its own.

    Two factors hold r (d_out + d_in); pivoted storage r^2 fewer. Row numbers of pivots are not counted: they are
    indices, not parameters.
    """
    return 0 if weight.tied else weight.copies * get_storage(storage).numbers(*weight.shape, rank)


def held_bytes(weight: Weight, rank: int | None, form: str, each: int) -> int:
    """Bytes of `weight` in a checkpoint as the storage `form` keeps it, `each` for a number in full.

    Scales and the row numbers of pivots count. `rank` None: dense, in full (`dense`) or in few bits (`dense:4:32`).
    """
    if weight.tied:
        return 0
    if rank is None and form == DENSE:
        return each * weight.parameters
    return weight.copies * matrix_bytes(get_storage(form), weight.shape, rank or min(weight.shape), each)


def matrix_bytes(storage: Storage, shape: tuple[int, int], rank: int, each: int) -> int:
    """The same of one matrix (d_out, d_in) in any format."""
    number = SCALE if isinstance(storage, Rounded) else each
    return storage.bytes(*shape, rank, number) + index_bytes(storage, shape, rank)


def index_bytes(storage: Storage, shape: tuple[int, int], rank: int) -> int:
    """Bytes of row numbers and the like; what is tied to a matrix has such of its own."""
    base = storage.base if isinstance(storage, Rounded) else storage
    sizes = base.shapes(*shape, rank)
    return sum(math.prod(sizes[suffix]) * base.index_type(suffix).itemsize for suffix in base.indices)


def largest_rank(weight: Weight, numbers: float, storage: str, multiple: int) -> int:
    """The largest multiple of `multiple` whose factors hold at most `numbers`; 0 if there is none."""
    low, high = 0, min(weight.shape) // multiple
    while low < high:  # stored() rises with the rank
        middle = (low + high + 1) // 2
        if stored(weight, middle * multiple, storage) <= numbers:
            low = middle
        else:
            high = middle - 1
    return low * multiple
