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

from lillama.factorise.initialisers import balanced


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


def pivoted(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pivots, rows, coefficients) of A @ B, on the host, the latter two in float64; see PivotedLinear.set_factors."""
    import scipy.linalg

    r = A.shape[1]
    A64, B64 = A.detach().double().cpu(), B.detach().double().cpu()
    _, R, order = scipy.linalg.qr(A64.T.numpy(), mode="economic", pivoting=True)
    diagonal = abs(R.diagonal())
    if diagonal.min() <= diagonal.max() * 1e-12:
        # A of deficient rank has no r independent rows; the least-norm coefficients still serve.
        coefficients = scipy.linalg.lstsq(R[:, :r], R[:, r:])[0].T
    else:
        coefficients = scipy.linalg.solve_triangular(R[:, :r], R[:, r:]).T
    pivots, rest = torch.from_numpy(order[:r].copy()).long(), torch.from_numpy(order[r:].copy())
    return pivots, A64[pivots] @ B64, torch.from_numpy(coefficients)[rest.argsort()]


def unpivoted(B: Tensor, C: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors in float64 of the matrix cat(B, C B)[order]."""
    rows = B.detach().double()
    one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    Q, R = torch.linalg.qr(torch.cat([one, C.detach().double()])[order])
    rows = R @ rows
    U = torch.linalg.eigh(rows @ rows.T)[1]
    return balanced(Q @ U, U.T @ rows)


def orders(pivots: Tensor, d_out: int) -> tuple[Tensor, Tensor]:
    """(order, inverse): cat(pivot rows, others)[order] is the output in its own order."""
    rest = torch.ones(d_out, dtype=torch.bool, device=pivots.device)
    rest[pivots] = False
    inverse = torch.cat([pivots, rest.nonzero().squeeze(1)])
    return inverse.argsort(), inverse


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


class LowRankEmbedding(_Factors):
    """A table of token vectors kept as A (vocabulary x r) and B (r x d): token t has the vector A[t] B."""

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.A = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        # As a dense table does under autocast: the residual stream begins here, in full precision.
        return F.linear(F.embedding(ids, self.A, self.padding_idx), self.B.T).to(self.B.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class PivotedEmbedding(PivotedLinear):
    """A table of token vectors kept as those of r tokens (B) and the coefficients (C) of the others in them."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, rank, False, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        place = self._order()[0][ids]
        pivots = F.embedding(place.clamp(max=self.rank - 1), self.B)
        if self.rank == self.num_embeddings:
            return pivots
        others = F.linear(F.embedding((place - self.rank).clamp(min=0), self.C), self.B.T)
        return torch.where((place < self.rank)[..., None], pivots, others.to(pivots.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
