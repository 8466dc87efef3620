"""How many numbers a low-rank weight holds."""

from __future__ import annotations

from lillama.contract import Weight
from lillama.lowrank.storage import get_storage


def stored(weight: Weight, rank: int, storage: str) -> int:
    """How many numbers a rank-`rank` version of `weight` holds (DESIGN 6). A tied weight holds nothing of its own.

    Two factors hold r (d_out + d_in); pivoted storage r^2 fewer. Row numbers of pivots are not counted: they are
    indices, not parameters.
    """
    return 0 if weight.tied else weight.copies * get_storage(storage).numbers(*weight.shape, rank)


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
