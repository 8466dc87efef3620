"""Several models on one device, taking turns: what is measured of them one after the other is compared fairly.

The machine changes its pace under us (heat, neighbours): only measurements next to each other say which model is
faster, and by how much.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """Models on a device, all at once or, where they do not fit together, each when its turn comes."""

    def __init__(self, models: Sequence[Any], device: Any) -> None:
        self.models, self.device = models, device
        self.together = True
        try:
            for model in models:
                model.to(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.together = False

    def use(self, which: int) -> Any:
        """The model at `which`, on the device."""
        if not self.together:
            for number, model in enumerate(self.models):
                if number != which:
                    model.to("cpu")
            give_back()
            self.models[which].to(self.device)
        return self.models[which]

    def run(self, which: int, work: Callable[[Any], T]) -> T:
        """`work` on the model at `which`; where the others leave too little memory for it, they go until their turn."""
        try:
            return work(self.use(which))
        except Exception as error:
            alone = not self.together or len(self.models) == 1 or self.device.type == "cpu"
            if alone or not is_out_of_memory(error):
                raise
        self.together = False
        return work(self.use(which))


def alternating(count: int, rounds: int) -> Iterator[tuple[int, list[int]]]:
    """(round, order) of `rounds` rounds of `count` turns, every other one backwards: a steady drift cancels out."""
    for number in range(rounds):
        order = list(range(count))
        yield number, order if number % 2 else order[::-1]


def ratio(original: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other model is, from seconds of neighbours: [median, smallest, largest]."""
    ratios = sorted(a / b for a, b in zip(original, other))
    return [statistics.median(ratios), ratios[0], ratios[-1]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on any device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = re.search(r"not enough memory|can't allocate memory", str(error))
    return isinstance(error, RuntimeError) and said is not None


def give_back() -> None:
    """Free what an attempt that ran out of memory left behind."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
