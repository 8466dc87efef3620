"""Storage `factors`: a rank-r matrix as A (d_out x r) and B (r x d_in)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lillama.lowrank.arithmetic import ONE_MATRIX, Products, look_up_factors, multiply_factors
from lillama.lowrank.storage import Factors, Storage, Tensors


class FactorStorage(Storage):
    """Two factors, r (d_out + d_in) numbers: what learns, whatever the format that is saved in the end."""

    parameters = ("A", "B")
    trained_as = None

    def shapes(self, d_out: int, d_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"A": (d_out, rank), "B": (rank, d_in)}

    def encode(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"A": A, "B": B}

    def decode(self, tensors: Tensors) -> Factors:
        return Factors(tensors["A"], tensors["B"])

    def multiply(
        self, x: Tensor, tensors: Tensors, derived: Any, products: Products = ONE_MATRIX, bias: Tensor | None = None
    ) -> Tensor:
        return multiply_factors(x, tensors["A"], tensors["B"], products, bias)

    def look_up(self, ids: Tensor, tensors: Tensors, derived: Any, padding_idx: int | None = None) -> Tensor:
        return look_up_factors(ids, tensors["A"], tensors["B"], padding_idx)


def balanced(A: Tensor, B: Tensor) -> Factors:
    """The same product with |column i of A| = |row i of B|: one learning rate then serves both."""
    a, b = A.norm(dim=0), B.norm(dim=1)
    scale = (b / a.clamp_min(1e-300)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Factors(A * scale, B / scale[:, None])
