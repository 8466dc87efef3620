"""Ways to keep weights that each take a size and cost a loss, in the order in which they are worth their size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar


class Way(Protocol):
    """One way to keep a weight."""

    @property
    def loss(self) -> float:
        """Nats per token."""


W = TypeVar("W", bound=Way)
Size = Callable[[W], int]


def worth(before: W, after: W, size: Size[W]) -> float:
    """Loss saved for each number, or byte, spent."""
    return (before.loss - after.loss) / (size(after) - size(before))


def steps(found: Mapping[str, Sequence[W]], size: Size[W]) -> list[tuple[str, W]]:
    """(name, the next way) along every weight's lower convex hull, what saves most for its size first.

    The ways of a weight rise in size. Along a hull a step is never worth more than the one before it, so those of one
    weight come in their order.
    """
    taken = [
        (-worth(before, after, size), name, after)
        for name, ways in found.items()
        for before, after in itertools.pairwise(_hull(ways, size))
    ]
    return [(name, after) for _, name, after in sorted(taken, key=lambda step: step[:2])]


def _hull(ways: Sequence[W], size: Size[W]) -> list[W]:
    """The lower convex hull of (size, loss), from the first way to the last."""
    hull: list[W] = []
    for way in ways:
        while len(hull) > 1 and worth(hull[-2], hull[-1], size) <= worth(hull[-1], way, size):
            hull.pop()
        hull.append(way)
    return hull
