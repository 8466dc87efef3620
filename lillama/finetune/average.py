"""The mean of the states that a fine-tuning goes through, which is judged and kept in place of the last one; an anchor.

Updates of a few hundred tokens leave noise in every number. The mean has less of it, and is nearer to where the model
began: what it was not taught suffers less (docs/results/quality.md; arXiv 1803.05407 for networks in general). The
anchor goes further that way (arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lillama.finetune.divided import learned_of


class Average:
    """The mean of what `learned` was after every update from number `begin` on; None: of none.

    A parameter of which this process has a part is averaged as that part.
    """

    def __init__(self, learned: Mapping[str, Tensor], begin: int | None) -> None:
        self.learned = list(learned.values())
        self.begin = begin
        self.mean: list[Tensor] = []

    @property
    def own(self) -> list[Tensor]:
        """What is learned, where it is now: the trainer moves a model to its device after this was made."""
        return [p.to_local() if isinstance(p, DTensor) else p.data for p in self.learned]

    @torch.no_grad()
    def add(self, update: int) -> None:
        """Count the state after the update of this number, the first being 1; every update once, in their order."""
        if self.begin is None or update < self.begin:
            return
        if self.mean:
            torch._foreach_lerp_(self.mean, self.own, 1 / (update - self.begin + 1))
        else:
            self.take()

    def take(self) -> None:
        """Let the mean be the state that the model is in."""
        self.mean = [tensor.detach().clone() for tensor in self.own]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's state and the mean, where there is one."""
        for own, mean in zip(self.own, self.mean):
            state = own.clone()
            own.copy_(mean)
            mean.copy_(state)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the mean for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class Anchor:
    """What learns of a model, as it is now, to which a `share` of the way is gone back in the end; None: nothing is."""

    def __init__(self, model: nn.Module, share: float | None) -> None:
        self.share = share or 0.0
        # By name: adapters leave the parameters that they were merged into, not those that were there.
        self.began = {name: p.detach().clone() for name, p in learned_of(model).items()} if share else {}

    @torch.no_grad()
    def go_back(self, model: nn.Module) -> None:
        """Move every parameter back by the share."""
        for name, began in self.began.items():
            model.get_parameter(name).lerp_(began, self.share)
