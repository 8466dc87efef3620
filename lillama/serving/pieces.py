"""A matrix in few bits, or what a process has of it: rows, and the columns of its inputs.

Scales belong to groups of columns, and two codes of 4 bits to a byte, so a process keeps whole groups: where the engine
splits a matrix inside a group, each of the two processes has that group, with codes of 0 where the columns are not its
own. The numbers of a process are then exactly those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.errors import LillamaError
from lillama.lowrank.coded import GROUPS, pack, spread, unpack

BITS = {torch.int8: 8, torch.uint8: 4}  # by the type that holds the codes


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix, code x scale, whose own columns are `columns` from `left` on."""

    codes: Tensor
    """[n, bytes], as checkpoints keep them."""
    scale: Tensor
    """[n, groups]."""
    bits: int
    group: int
    left: int
    columns: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> Piece:
        """The whole matrix of a checkpoint's tensors. Raises LillamaError where these do not go together.

        The size of a group follows from theirs: where two sizes would do there is one group, and both are the same.
        """
        given = f"codes {list(codes.shape)} of {codes.dtype} and scales {list(scale.shape)}"
        if codes.dtype not in BITS or codes.dim() != 2 or scale.dim() != 2 or not scale.is_floating_point():
            raise LillamaError(f"{given} are no matrix in few bits")
        columns = codes.shape[1] * 8 // BITS[codes.dtype]
        fitting = [group for group in GROUPS if -(-columns // group) == scale.shape[1]]
        if not fitting or len(scale) != len(codes):
            raise LillamaError(f"{given} do not go together")
        return cls(codes, scale, BITS[codes.dtype], fitting[0], 0, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and columns of this process."""
        return len(self.codes), self.columns

    @property
    def like(self) -> tuple[int, int, int, int]:
        """What pieces have in common that can be one, row below row."""
        return self.bits, self.group, self.left, self.columns

    @property
    def width(self) -> int:
        """How many columns there are in whole groups."""
        return self.scale.shape[1] * self.group

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Tensor) -> Piece:
        return replace(self, codes=self.codes[rows], scale=self.scale[rows])

    def of_columns(self, columns: Tensor) -> Piece:
        """The piece of these columns, which lie side by side, of a whole matrix."""
        start, end = int(columns[0]), int(columns[-1]) + 1
        if not torch.equal(columns.cpu(), torch.arange(start, end, device="cpu")):
            raise LillamaError("the columns of a process do not lie side by side: few bits cannot be split so")
        first, last = start // self.group, -(-end // self.group)
        codes = self.numbers()[:, first * self.group : last * self.group].clone()
        left = start - first * self.group
        codes[:, :left] = 0
        codes[:, left + end - start :] = 0
        return Piece(pack(codes, self.bits), self.scale[:, first:last], self.bits, self.group, left, end - start)

    def numbers(self) -> Tensor:
        """The codes [n, width] as int8, with codes of 0 until the last group is whole."""
        codes = unpack(self.codes, self.bits)
        return F.pad(codes, (0, self.width - codes.shape[1]))

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself [n, columns]."""
        numbers = self.numbers().to(dtype) * spread(self.scale.to(dtype), self.group, self.width)
        return numbers[:, self.left : self.left + self.columns]

    def longer(self, rows: int) -> Piece:
        """With so many rows of zeros behind it."""
        codes, scale = self.codes.new_zeros(rows, self.codes.shape[1]), self.scale.new_ones(rows, self.scale.shape[1])
        return replace(self, codes=torch.cat([self.codes, codes]), scale=torch.cat([self.scale, scale]))


Matrix = Tensor | Piece


def stacked(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one kind, row below row."""
    first = matrices[0]
    if isinstance(first, Piece):
        pieces = [one for one in matrices if isinstance(one, Piece)]
        both = torch.cat([one.codes for one in pieces]), torch.cat([one.scale for one in pieces])
        return replace(first, codes=both[0], scale=both[1])
    return torch.cat([one for one in matrices if isinstance(one, Tensor)])


def longer(matrix: Matrix, rows: int) -> Matrix:
    """The matrix with rows of zeros behind it."""
    if isinstance(matrix, Piece):
        return matrix.longer(rows)
    return torch.cat([matrix, matrix.new_zeros(rows, matrix.shape[1])])


def of_columns(matrix: Matrix, columns: Tensor | None) -> Matrix:
    """The columns of a process (None: all)."""
    if columns is None:
        return matrix
    return matrix.of_columns(columns) if isinstance(matrix, Piece) else matrix[:, columns]


def whole(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix itself."""
    return matrix.whole(dtype) if isinstance(matrix, Piece) else matrix.to(dtype)
