"""Modules of one low-rank matrix: linears and embeddings, as two factors or as pivot rows and coefficients.

`LowRankLinear` computes y = A (B x) + b with A (d_out x r) and B (r x d_in); `PivotedLinear` holds r rows of the same
rank-r matrix and the coefficients of the other rows in them: r^2 numbers fewer (DESIGN 6; PIFA, arXiv 2501.19090).
The embeddings hold a table W (vocabulary x d) the same way, so that the tensors of an embedding are those of an
output head tied to it. All offer `weight`, which multiplies the factors back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.lowrank.pivot import Permute, orders, pivoted, unpivoted


class _Factors(nn.Module):
    """What holds a matrix as A (d_out x r) and B (r x d_in); a table's d_out is the vocabulary."""

    A: nn.Parameter
    B: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """A @ B (d_out x d_in). Some architectures read a projection's weight directly (DESIGN 9)."""
        return self.A @ self.B

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take over A (d_out x r) and B (r x d_in), cast to this module's dtype."""
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)


class LowRankLinear(_Factors):
    """A linear map through `rank` dimensions. The bias stays on the output side."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.A.new_empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.B), self.A, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class PivotedLinear(nn.Module):
    """A rank-r linear map kept as r of its rows (B) and the coefficients (C) of the others in them.

    `pivots` holds the row numbers of B's rows; the rows of C follow in rising order of the rest.
    """

    pivots: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.B = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.B.new_empty(out_features)) if bias else None)
        self.register_buffer("pivots", torch.arange(rank, device=device))
        self._orders: tuple[Tensor, Tensor, Tensor] | None = None  # derived from pivots on first use

    def _order(self) -> tuple[Tensor, Tensor]:
        """(order, inverse): cat(pivot rows, others)[order] is the output in its own order."""
        if self._orders is None or self._orders[2] is not self.pivots:
            self._orders = (*orders(self.pivots, self.out_features), self.pivots)
        return self._orders[:2]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._orders = None  # the pivots were overwritten in place

    @property
    def weight(self) -> Tensor:
        """The matrix (d_out x d_in) itself."""
        return torch.cat([self.B, self.C @ self.B])[self._order()[0]]

    def forward(self, x: Tensor) -> Tensor:
        pivots = F.linear(x, self.B)
        y: Tensor = Permute.apply(torch.cat([pivots, F.linear(pivots, self.C)], -1), *self._order())
        return y if self.bias is None else y + self.bias

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Store A @ B, with pivot rows chosen by column-pivoted QR of A^T, in float64.

        The pivots are then well spread, which keeps the coefficients small enough for bfloat16.
        """
        with torch.no_grad():
            for own, found in zip((self.pivots, self.B, self.C), pivoted(A, B)):
                own.copy_(found)
        self._orders = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Balanced factors A (d_out x r) and B (r x d_in) of the same matrix, in float64."""
        return unpivoted(self.B, self.C, self._order()[0])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"
