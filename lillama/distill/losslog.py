"""The losses of a layer's steps, and the watch for numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lillama.errors import DistillationError
from lillama.recipe.schema import Distill

READ_EVERY = 16  # steps: how often losses are read from a device that works while the host goes on


class LossLog:
    """The losses of one layer's steps, looked at for the first that is not finite.

    Reading a number from a GPU makes the host wait for it, once per layer and step; so there losses are read several
    at a time. On a CPU reading is free, and every one is looked at before its step is taken.
    """

    def __init__(self, layer: str, distill: Distill, device: torch.device) -> None:
        self.layer, self.distill = layer, distill
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Take note of a step's loss; raises DistillationError as `read` does, when it is time to look."""
        self._waiting.append((step, loss))
        if len(self._waiting) >= self.every:
            self.read()

    def read(self) -> None:
        """Look at the losses that wait. Raises DistillationError that names the layer and the first bad step."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = torch.stack([loss for _, loss in waiting]).tolist()
        for (step, _), value in zip(waiting, values):
            if not math.isfinite(value):
                raise DistillationError(
                    f"the loss became {value} at step {step}",
                    where=self.layer,
                    hint=f"Lower distill.learning_rate ({self.distill.learning_rate:g}) or set distill.clip_norm.",
                )

    def refuse_unless_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise DistillationError for the first tensor that is not finite."""
        for name, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise DistillationError(f"the weights {name} are not finite", where=self.layer)
