"""Columns of a tensor in another order, with a gradient that is as fast as the gather itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Permute(torch.autograd.Function):
    """x[..., order], whose gradient is a second gather: autograd's own would scatter, element by element.

    `gather` and not `index_select`, which takes three times as long on bfloat16 on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.gather(-1, order.expand_as(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.gather(-1, inverse.expand_as(gradient)), None, None
