"""Batches in an order drawn by a seed, so that the first of them are of all of a text and not of its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from lillama.pretrained.calls import Batches, RawBatch


def drawn_order(count: int, seed: int) -> list[int]:
    """The numbers below `count`, shuffled."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


class Drawn(Sequence[RawBatch]):
    """A view of batches in a drawn order; `order[i]` is the number of the i-th of the view among them."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.order = batches, drawn_order(len(batches), seed)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> RawBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[RawBatch]: ...
    def __getitem__(self, index: Any) -> Any:
        """A batch, or a list of some."""
        if isinstance(index, slice):
            return [self.batches[number] for number in self.order[index]]
        return self.batches[self.order[index]]
