"""Few bits in bfloat16 on a CPU: torch's product with 4-bit numbers, which takes scales and zeros by groups.

A code of 8 bits is 16 x its upper half + its lower one, so a matrix of 8 bits is one of 4 bits with twice the columns:
y = [16 s U, s L] [x; x]. The sums are of the same numbers, in float32. Many rows at once are cheaper with the matrix
itself, which is then made for the call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.utils.torch_utils import direct_register_custom_op

from lillama.serving.pieces import Piece

ROWS = {4: 128, 8: 64}  # of inputs, from which making the matrix costs less than it saves (measured, by bits)
AT_ONCE = 2**20  # numbers made whole at a time, so that they stay in the caches
BLOCK = 64  # rows of a matrix that torch lays out together, on any CPU


@functools.cache
def layout() -> tuple[int, tuple[int, ...]] | None:
    """(rows of a block, row of each place) as torch packs 4-bit numbers in this process; None where this is not known.

    A block of b rows has for every column b / 2 bytes; the places are the lower halves of these, then the upper ones.
    """
    n = torch.arange(BLOCK, device="cpu")
    numbers = torch.zeros(BLOCK, 32, dtype=torch.int32, device="cpu")
    numbers[:, 0], numbers[:, 1] = n % 16, n // 16
    try:
        kept = torch._convert_weight_to_int4pack_for_cpu(numbers, 1).view(torch.uint8).flatten()
    except (RuntimeError, AttributeError):
        return None
    for rows in (64, 32, 16):
        halves = kept.view(-1, 32, rows // 2)
        places = torch.cat([halves & 15, halves >> 4], -1)
        found = places[:, 0].int() + 16 * places[:, 1].int()
        starts = torch.arange(0, BLOCK, rows, device="cpu")[:, None]
        if bool((found.sort(-1).values == starts + torch.arange(rows, device="cpu")).all()):
            return rows, tuple(found[0].tolist())
    return None


class Packed(nn.Module):
    """x -> x W^T, and rows of W, for a piece that torch has packed; `layout` must be known."""

    places: Tensor

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.bits, self.group = piece.bits, piece.group
        self.rows_out, self.columns = piece.shape
        self.around = (piece.left, piece.width - piece.left - piece.columns)
        more = -len(piece) % BLOCK
        codes = F.pad(piece.numbers(), (0, 0, 0, more))
        scale = F.pad(piece.scale, (0, 0, 0, more), value=1.0).to(torch.bfloat16).T
        zero = torch.zeros_like(scale)
        if piece.bits == 8:
            scale, zero = torch.cat([16 * scale, scale]), torch.cat([zero, 8 * scale])
        step = BLOCK * max(1, AT_ONCE // (BLOCK * piece.width))  # torch packs numbers of 32 bits: not all at once
        packed = torch.cat([_pack(some, piece.bits) for some in codes.split(step)])
        known = layout()  # asked here: no compiler can
        assert known is not None
        self.register_buffer("places", torch.tensor(known[1]).argsort(), persistent=False)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(torch.stack([scale, zero], -1).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.around):
            x = F.pad(x, self.around)
        y = torch.ops.vllm.lillama_few_bits(x.flatten(0, -2), self.packed, self.scales, self.bits, self.group)
        return y[:, : self.rows_out].unflatten(0, x.shape[:-1])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of W."""
        size = len(self.places)
        half = size // 2
        places = self.places[ids % size]
        kept = self.packed.view(torch.uint8).view(-1, len(self.scales) * self.group, half)
        picked = kept[ids // size, :, places % half] >> (places // half * 4)[..., None] & 15
        scale = _scale(self.scales, self.bits)[:, ids].movedim(0, -1).repeat_interleave(self.group, -1)
        vectors = _codes(picked.to(torch.int16), self.bits, -1).to(scale.dtype) * scale
        return vectors[..., self.around[0] : self.around[0] + self.columns]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as torch's product takes them, which computes (number - 8) x scale + zero of numbers from 0 to 15."""
    codes = codes.to(torch.int32)
    numbers = codes + 8 if bits == 4 else torch.cat([(codes >> 4) + 8, codes & 15], 1)
    return torch._convert_weight_to_int4pack_for_cpu(numbers, 1)


def _scale(scales: Tensor, bits: int) -> Tensor:
    """The scales themselves [groups, rows]: of 8 bits those of the lower halves."""
    return scales[len(scales) // 2 if bits == 8 else 0 :, :, 0]


def _codes(numbers: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of the numbers from 0 to 15 that stand for them."""
    if bits == 4:
        return numbers - 8
    upper, lower = numbers.chunk(2, dim)
    return (upper - 8) * 16 + lower


def _multiply(x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    known = layout() if len(x) >= ROWS[bits] else None
    if known is not None:
        return _multiply_whole(x, packed, scales, bits, group, known)
    x = torch.cat([x, x], -1) if bits == 8 else x.contiguous()
    y: Tensor = torch._weight_int4pack_mm_for_cpu(x, packed, group, scales)
    return y


def _multiply_whole(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, known: tuple[int, tuple[int, ...]]
) -> Tensor:
    """The same with W^T itself [columns, rows], its blocks one after the other."""
    size, rows = known
    kept = packed.view(torch.uint8).view(-1, len(scales) * group, size // 2)
    in_order = list(rows) == sorted(rows)
    scale = _scale(scales, bits)
    results = []
    step = max(1, AT_ONCE // (len(scales) * group * size))
    for start in range(0, len(kept), step):
        some = kept[start : start + step]
        numbers = torch.cat([some & 15, some >> 4], -1).view(torch.int8)
        if not in_order:
            numbers = numbers[..., torch.tensor(rows).argsort()]
        codes = _codes(numbers, bits, 1).to(x.dtype)
        each = scale[:, start * size : start * size + len(some) * size].view(-1, len(some), size).movedim(1, 0)
        W = codes.unflatten(1, (-1, group)) * each[:, :, None]
        results.append(torch.matmul(x, W.flatten(1, 2)).movedim(0, 1).flatten(1))
    return results[0] if len(results) == 1 else torch.cat(results, -1)


def _shape(x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


# How many rows come decides how they are multiplied, which no compiler should look into.
direct_register_custom_op("lillama_few_bits", _multiply, fake_impl=_shape)
