"""Tensors in few bits: whole numbers (codes) and a scale for every group of them along the last dimension.

A number is code x scale. Codes of b bits go from -2^(b-1) to 2^(b-1) - 1, and there is no other zero than code 0. The
largest number of a group is put at the end that reaches furthest, whatever its sign, so a scale may be negative. Groups
lie along the dimension that products sum over, as the kernels of GPUs and of CPUs want it. Scales are bfloat16 numbers,
in whatever type they are kept. Codes of 4 bits lie two in a byte, the even column in the lower half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 1.05, 1.1, 1.15)  # of the scale that reaches the largest number
BITS = (4, 8)
GROUPS = (32, 64, 128)


class Coded:
    """A matrix [.., n, k] as codes and scales, which multiplies and is looked up as a tensor is (`F.linear`)."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, group: int) -> None:
        """`codes` [.., n, bytes], as `pack` makes them, `scale` [.., n, groups]."""
        self.codes, self.scale, self.bits, self.group = codes, scale, bits, group

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def dtype(self) -> torch.dtype:
        """That of its numbers."""
        return self.scale.dtype

    @property
    def T(self) -> Tensor:  # noqa: N802  as a tensor calls it
        """The matrix itself, transposed."""
        return self.whole().T

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)  # what a format of somebody's own may ask of a tensor

    def __mul__(self, other: Any) -> Tensor:
        return self.whole() * other

    def __rmul__(self, other: Any) -> Tensor:
        return other * self.whole()

    def __matmul__(self, other: Any) -> Tensor:
        return self.whole() @ other

    def __rmatmul__(self, other: Any) -> Tensor:
        return other @ self.whole()

    def __add__(self, other: Any) -> Tensor:
        return self.whole() + other

    def __radd__(self, other: Any) -> Tensor:
        return other + self.whole()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Coded:
        """Some of the matrices of a stack, or some rows of a matrix."""
        return Coded(self.codes[rows], self.scale[rows], self.bits, self.group)

    def whole(self) -> Tensor:
        """The matrix itself, in the type of the scales."""
        numbers = unpack(self.codes, self.bits).to(self.scale.dtype)
        return numbers * spread(self.scale, self.group, self.shape[-1])

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A table is looked up row by row; everything else is done with the matrix itself."""
        if function is F.embedding and isinstance(args[1], Coded):
            return args[1][args[0]].whole()
        given = [one.whole() if isinstance(one, Coded) else one for one in args]
        return function(*given, **(kwargs or {}))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [.., k] as they are kept: int8 [.., k], or of 4 bits uint8 [.., k/2]; k is even then."""
    if bits == 8:
        return codes.to(torch.int8)
    nibbles = codes.to(torch.int16) & 15
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8)


def unpack(kept: Tensor, bits: int) -> Tensor:
    """The whole numbers [.., k] that `pack` put away, as int8."""
    if bits == 8:
        return kept
    both = torch.stack([kept & 15, kept >> 4], -1).flatten(-2).to(torch.int8)
    return both - ((both & 8) << 1)


def spread(scale: Tensor, group: int, columns: int) -> Tensor:
    """Scales [.., groups] for every column [.., columns]."""
    return scale.repeat_interleave(group, -1)[..., :columns]


def find_scales(W: Tensor, bits: int, group: int) -> Tensor:
    """The scales [.., groups] by which numbers [.., k] are rounded with the least squared error, of a few tried."""
    columns = W.shape[-1]
    padded = F.pad(W, (0, -columns % group)).unflatten(-1, (-1, group))
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))[..., 0]
    reach = -largest / 2 ** (bits - 1)
    best = _kept(reach)
    least = _lost(padded, best, bits)
    for share in SHRINK[1:] if bits < 8 else ():
        scale = _kept(reach * share)
        lost = _lost(padded, scale, bits)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def round_to(W: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes nearest to W, by a scale for each number, as floating-point numbers."""
    most = 2 ** (bits - 1)
    return (W / scale).round().clamp(-most, most - 1)


def round_nearest(W: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of W, every number rounded for itself; codes are not packed."""
    scale = find_scales(W, bits, group)
    return round_to(W, spread(scale, group, W.shape[-1]), bits), scale


def _kept(scale: Tensor) -> Tensor:
    """Scales as they are kept; of numbers that are all nothing any will do, but none that is 0."""
    kept = scale.bfloat16().to(scale.dtype)
    return torch.where(kept == 0, torch.ones_like(kept), kept)


def _lost(padded: Tensor, scale: Tensor, bits: int) -> Tensor:
    each = scale[..., None]
    return (round_to(padded, each, bits) * each - padded).square().sum(-1)
