"""Calculations that do not depend on each other, side by side on the processor's cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

SMALL = 1536  # rows: more cores decompose a larger matrix faster than one does (docs/results/speed.md)
MOST = 8  # calculations at once: each has matrices of its own

Task = TypeVar("Task")
Found = TypeVar("Found")


def side_by_side(
    calculate: Callable[[Task], Found], tasks: Sequence[Task], device: torch.device, rows: int
) -> list[Found]:
    """What `calculate` finds of every task, in their order; no gradient comes back through it.

    `rows` are those of the largest matrix that is decomposed. On the processor, where all are small, as many tasks run
    at once as torch has threads, each on one: two cores are slower than one at a decomposition of some hundred rows,
    which waits for both at every row. A card does one after another, as it does anyway.
    """

    def alone(task: Task) -> Found:
        with torch.no_grad():  # which every thread has to itself
            return calculate(task)

    if device.type != "cpu" or rows > SMALL:
        return [alone(task) for task in tasks]
    at_once = min(torch.get_num_threads(), len(tasks), MOST)
    with _threads(1):
        if at_once < 2:
            return [alone(task) for task in tasks]
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(alone, tasks))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use so many threads for one calculation as long as the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
