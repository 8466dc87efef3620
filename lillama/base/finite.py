"""Whether the numbers of a tensor are finite, in one pass over them and without a copy."""

from __future__ import annotations

import torch
from torch import Tensor


def extremes(tensor: Tensor) -> Tensor:
    """The least number and the largest [2], on the tensor's device: NaN both where any is; 0 of whole numbers."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.zeros(2, device=tensor.device)
    # There are no comparisons of numbers of 8 bits.
    return torch.stack((tensor.float() if tensor.element_size() == 1 else tensor).aminmax())


def finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are finite, as a boolean on the tensor's device, which nobody has waited for."""
    return extremes(tensor).isfinite().all()


def unless_finite(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, or `other` where `tensor` is not finite; only a CPU is waited for."""
    good = finite(tensor)
    if tensor.device.type == "cpu":
        return tensor if good else other
    return torch.where(good, tensor, other.to(tensor.dtype))


def is_finite(*tensors: Tensor) -> bool:
    """Whether all numbers of all tensors are finite."""
    return all(bool(finite(tensor)) for tensor in tensors)


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers stay finite when they are cast to `dtype`."""
    return is_finite(extremes(tensor).to(dtype))


def how_many(tensor: Tensor) -> str:
    """Of a tensor, how many numbers are not finite, in words: `3 of 1,024 numbers are`."""
    tensor = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    bad, total = int((~tensor.isfinite()).sum()), tensor.numel()
    return f"{bad:,} of {total:,} numbers {'is' if bad == 1 else 'are'}"
