"""Any storage in few bits: its tensors as codes and scales (coded.py). `pivoted:4:32` is one of 4 bits, groups of 32.

The tensor X of the format becomes `X_codes`, whole numbers, and `X_scale`, which learns where something does. A format
of its own need not know of this: it computes with what stands for its tensors as if these were tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lillama.errors import LillamaError
from lillama.lowrank.arithmetic import ONE_MATRIX, Products
from lillama.lowrank.coded import BITS, GROUPS, Coded, pack, round_nearest
from lillama.lowrank.format import Factors, Storage, Tensors

CODES, SCALE = "_codes", "_scale"


class Rounded(Storage):
    """The tensors of another format in few bits."""

    trained_as = None

    def __init__(self, base: Storage, bits: int, group: int) -> None:
        self.base, self.bits, self.group = base, bits, group
        self.name = f"{base.name}:{bits}:{group}"
        self.parameters = tuple(suffix + SCALE for suffix in base.parameters)  # type: ignore[misc]
        self.narrow = self.parameters  # type: ignore[misc]
        self.shared_indices = tuple(suffix + CODES for suffix in base.parameters)  # type: ignore[misc]
        self.indices = (*(suffix + CODES for suffix in base.parameters), *base.indices)  # type: ignore[misc]

    def shapes(self, d_out: int, d_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        each = self.base.shapes(d_out, d_in, rank)
        found = {s + SCALE: (each[s][0], -(-each[s][1] // self.group)) for s in self.base.parameters}
        found |= {s + CODES: (each[s][0], each[s][1] * self.bits // 8) for s in self.base.parameters}
        return found | {suffix: each[suffix] for suffix in self.base.indices}

    def index_type(self, suffix: str) -> torch.dtype:
        if suffix in self.base.indices:
            return self.base.index_type(suffix)
        return torch.int8 if self.bits == 8 else torch.uint8

    def is_even(self, d_out: int, d_in: int, rank: int) -> bool:
        """Whether the bits of a row fill whole bytes: 4 bits want an even number of columns, 0 among them."""
        each = self.base.shapes(d_out, d_in, rank)
        return all(each[suffix][-1] * self.bits % 8 == 0 for suffix in self.base.parameters)

    def numbers(self, d_out: int, d_in: int, rank: int) -> int:
        """How many numbers the matrix is of: as many as in the format itself."""
        return self.base.numbers(d_out, d_in, rank)

    def bytes(self, d_out: int, d_in: int, rank: int, each: float) -> int:
        held = self.shapes(d_out, d_in, rank)
        codes = sum(n * k for n, k in (held[s + CODES] for s in self.base.parameters))
        return codes + round(each * sum(n * k for n, k in (held[s + SCALE] for s in self.base.parameters)))

    def encode(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Every number is rounded for itself; bits/weights.py does better where more is known."""
        return self.kept(self.base.encode(A, B))

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        """The format's own tensors, each number rounded to the nearest, as this keeps them."""
        rounded = {s: round_nearest(tensors[s].float(), self.bits, self.group) for s in self.base.parameters}
        return self.packed(rounded) | {suffix: tensors[suffix] for suffix in self.base.indices}

    def packed(self, rounded: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """(codes, scales) of the format's tensors as this keeps them, by suffix."""
        found = {suffix + CODES: pack(codes, self.bits) for suffix, (codes, _) in rounded.items()}
        return found | {suffix + SCALE: scale for suffix, (_, scale) in rounded.items()}

    def decode(self, tensors: Tensors) -> Factors:
        return self.base.decode(self.whole(tensors))

    def derive(self, tensors: Tensors) -> Any:
        if not self.base.indices:
            return None
        return self.base.derive({**self._coded(tensors), **{s: tensors[s] for s in self.base.indices}})  # type: ignore[dict-item]

    def multiply(
        self, x: Tensor, tensors: Tensors, derived: Any, products: Products = ONE_MATRIX, bias: Tensor | None = None
    ) -> Tensor:
        return self.base.multiply(x, self._coded(tensors), derived, products, bias)  # type: ignore[arg-type]

    def product(self, tensors: Tensors, derived: Any) -> Tensor:
        return self.base.product(self.whole(tensors), derived)

    def look_up(self, ids: Tensor, tensors: Tensors, derived: Any, padding_idx: int | None = None) -> Tensor:
        return self.base.look_up(ids, self._coded(tensors), derived, padding_idx)  # type: ignore[arg-type]

    def whole(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors of the format itself, in the type of the scales."""
        found = {suffix: coded.whole() for suffix, coded in self._coded(tensors).items()}
        return found | {suffix: tensors[suffix] for suffix in self.base.indices}

    def _coded(self, tensors: Tensors) -> dict[str, Coded]:
        found = {}
        for suffix in self.base.parameters:
            codes, scale = tensors[suffix + CODES], tensors[suffix + SCALE]
            found[suffix] = Coded(codes, scale, self.bits, self.group)
        return found


def read_name(name: str) -> tuple[str, int, int] | None:
    """(format, bits, group) of a name such as `pivoted:4:32`; None for a format in full.

    Raises LillamaError for bits or groups that are not served.
    """
    base, colon, rest = name.partition(":")
    if not colon:
        return None
    known = {f"{bits}:{group}": (bits, group) for bits in BITS for group in GROUPS}
    if rest not in known:
        raise LillamaError(
            f"the storage '{name}' is none of this version: '{rest}' are no bits and group size that it knows",
            hint=f"Known are {', '.join(known)}, each behind the name of a format.",
        )
    return base, *known[rest]
