"""Storage `dense`: a matrix as it is. Of use only with few bits (rounded.py): no recipe asks for it by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.lowrank.arithmetic import ONE_MATRIX, Products
from lillama.lowrank.format import Factors, Storage, Tensors

NAME = "dense"


class DenseStorage(Storage):
    """All d_out x d_in numbers, whatever the rank."""

    parameters = ("W",)
    trained_as = None

    def shapes(self, d_out: int, d_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"W": (d_out, d_in)}

    def encode(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"W": A @ B}

    def decode(self, tensors: Tensors) -> Factors:
        W = tensors["W"]
        d_out, d_in = W.shape
        one = torch.eye(min(d_out, d_in), dtype=W.dtype, device=W.device)
        return Factors(one, W) if d_out <= d_in else Factors(W, one)

    def multiply(
        self, x: Tensor, tensors: Tensors, derived: Any, products: Products = ONE_MATRIX, bias: Tensor | None = None
    ) -> Tensor:
        y: Tensor = products.linear(x, tensors["W"], bias)
        return y

    def product(self, tensors: Tensors, derived: Any) -> Tensor:
        return tensors["W"]

    def look_up(self, ids: Tensor, tensors: Tensors, derived: Any, padding_idx: int | None = None) -> Tensor:
        return F.embedding(ids, tensors["W"], padding_idx)
