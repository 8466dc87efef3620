"""Which part of a run's work is this process's, where a launcher started several (ranks.py); else all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lillama.base import ranks

T = TypeVar("T")
Found = TypeVar("Found")


def share(items: Sequence[T]) -> Sequence[T]:
    """Every so manieth of `items`, those of this process."""
    return items if ranks.world() == 1 else items[ranks.rank() :: ranks.world()]


def part(count: int, number: int | None = None) -> range:
    """Which of `count` things in a row are those of process `number` (None: of this one): neighbours, as many as the
    others have or one more.
    """
    number = ranks.rank() if number is None else number
    return range(number * count // ranks.world(), (number + 1) * count // ranks.world())


def owners(costs: Sequence[float]) -> list[int]:
    """The process for each of some tasks, the dearest first to whoever has least to do."""
    loads, found = [0.0] * ranks.world(), [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[task] = min(range(len(loads)), key=loads.__getitem__)
        loads[found[task]] += costs[task]
    return found


def own_of(tasks: Sequence[T], costs: Sequence[float]) -> list[T]:
    """Those of some tasks that are this process's, in their order."""
    return [task for owner, task in zip(owners(costs), tasks) if owner == ranks.rank()]


def one_each(items: Sequence[T], work: Callable[[T], Found]) -> Iterator[tuple[T, Found | None]]:
    """Each of `items` with what `work` finds of it, which one process calls as if alone; the others do the next ones.

    The first process alone is given what was found; tensors should be on the host where there are several.
    """
    for start in range(0, len(items), ranks.world()):
        some, own = items[start : start + ranks.world()], None
        if (number := ranks.rank()) < len(some):
            with ranks.alone():
                own = work(some[number])
        found = ranks.collect(own)
        for number, item in enumerate(some):
            yield item, found[number] if found else None


def own_folder(path: Path) -> Path:
    """A folder below `path` for files of this process alone; `path` itself where there is one process."""
    return path if ranks.world() == 1 else path / f"{ranks.rank()}-of-{ranks.world()}"
