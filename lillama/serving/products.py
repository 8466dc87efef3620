"""The matrices of one layer, multiplied: one first product for all of them, a second for each of low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lillama.serving.kernels import multiplier
from lillama.serving.parts import Part
from lillama.serving.pieces import Piece, stacked


class Products(nn.Module):
    """All matrices with one input: their first products are one, and one gather puts the rows into their places.

    First products in other bits or groups than the rest are one of their own. Where every matrix is two factors, the
    results stand in their places as they are, and nothing is gathered.
    """

    order: Tensor | None

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype, device: torch.device, name: str) -> None:
        super().__init__()
        alike = _alike(parts)
        self.firsts = nn.ModuleList(
            multiplier(stacked([part.first for part in some]), dtype, device, name) for some in alike
        )
        parts = [part for some in alike for part in some]
        low = [part for part in parts if part.second is not None]
        self.seconds = nn.ModuleList(
            multiplier(part.second, dtype, device, name) for part in low if part.second is not None and len(part.second)
        )
        starts = torch.tensor([0, *(len(part.first) for part in parts)]).cumsum(0).tolist()
        slices = {id(part): slice(start, start + len(part.first)) for start, part in zip(starts, parts)}
        self.inputs = [slices[id(part)] for part in low if part.second is not None and len(part.second)]
        order = _order(parts, starts)
        # The first results belong to the output where a matrix is dense or pivoted.
        self.with_first = bool((order < starts[-1]).any())
        order = order if self.with_first else order - starts[-1]
        results = starts[-1] * self.with_first + sum(len(part.second) for part in low if part.second is not None)
        in_place = len(order) == results and bool((order == torch.arange(results)).all())
        self.register_buffer("order", None if in_place else order.to(device), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        firsts = [product(x) for product in self.firsts]
        first = firsts[0] if len(firsts) == 1 else torch.cat(firsts, -1)
        results = [second(first[..., own]) for own, second in zip(self.inputs, self.seconds)]
        if self.with_first:
            results.insert(0, first)
        y = results[0] if len(results) == 1 else torch.cat(results, -1)
        if self.order is not None:
            y = y.gather(-1, self.order.expand(*y.shape[:-1], -1))
        return y if bias is None else y + bias


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
    """The matrices whose first ones can be one, in the order in which their kinds come."""
    found: dict[object, list[Part]] = {}
    for part in parts:
        found.setdefault(part.first.like if isinstance(part.first, Piece) else None, []).append(part)
    return [*found.values()]


def _order(parts: Sequence[Part], starts: Sequence[int]) -> Tensor:
    """For each output of the layer its place among all first results and, behind these, all second ones."""
    order = torch.zeros_like(parts[0].source)
    behind = starts[-1]
    for start, part in zip(starts, parts):
        own, k = part.source > 0, len(part.first)
        place = part.source[own] - 1
        order[own] = torch.where(place < k, place + start, place - k + behind)
        behind += 0 if part.second is None else len(part.second)
    return order
