"""The losses of a layer's steps, and the watch for numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lillama.errors import DistillationError
from lillama.recipe.schema import Distill

READ_EVERY = 16  # steps: how often losses are read from a device that works while the host goes on


def _nothing() -> None:
    pass


class LossLog:
    """The losses of one layer's steps and the norms of their gradients, looked at for the first that is not finite.

    Reading a number from a GPU makes the host wait for it, once per layer and step; so there losses are read several
    at a time. On a CPU reading is free, and every one is looked at before its step is taken.
    """

    def __init__(
        self, layer: str, distill: Distill, device: torch.device, first: Callable[[], None] = _nothing
    ) -> None:
        """`first` is called before numbers are read, and may say that something else is at fault."""
        self.layer, self.distill, self.first = layer, distill, first
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self._waiting: list[tuple[int, Tensor, Tensor | None]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor | None = None) -> None:
        """Take note of a step's loss and of its gradient's norm; raises as `read` does, when it is time to look."""
        self._waiting.append((step, loss, norm))
        if len(self._waiting) >= self.every:
            self.read()

    def read(self) -> None:
        """Look at the numbers that wait. Raises DistillationError that names the layer and the first bad step."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self.first()
        pairs = [(loss, loss if norm is None else norm) for _, loss, norm in waiting]
        values = torch.stack([value for pair in pairs for value in pair]).tolist()
        for (step, *_), loss, norm in zip(waiting, values[::2], values[1::2]):
            for what, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(value):
                    raise DistillationError(
                        f"the {what} became {value} at step {step}",
                        where=self.layer,
                        hint=f"Lower distill.learning_rate ({self.distill.learning_rate:g}) or set distill.clip_norm.",
                    )

    @property
    def waits(self) -> bool:
        """Whether there are numbers that were not looked at."""
        return bool(self._waiting)

    def forget(self) -> None:
        """Drop the numbers that wait: they are of a state that was left."""
        self._waiting = []
