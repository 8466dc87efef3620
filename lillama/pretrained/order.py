"""Batches in an order drawn by a seed, so that the first of them are of all of a text and not of its beginning."""

from __future__ import annotations

import torch


def drawn_order(count: int, seed: int) -> list[int]:
    """The numbers below `count`, shuffled."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
