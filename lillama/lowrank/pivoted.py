"""Storage `pivoted`: a low-rank matrix as some of its own rows and the coefficients of the others in them.

A rank-r matrix needs only r (d_out + d_in) - r^2 numbers (DESIGN 6; PIFA, arXiv 2501.19090). B holds r rows, `pivots`
their row numbers, C the coefficients of the other rows in B, which follow in rising order. Rows and coefficients differ
in size, and one learning rate does not suit both: two factors learn in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lillama.base.device import factorising
from lillama.lowrank.arithmetic import (
    ONE_MATRIX,
    Orders,
    Products,
    look_up_pivoted,
    multiply_pivoted,
    pivoted_orders,
    product_pivoted,
)
from lillama.lowrank.factors import balanced
from lillama.lowrank.storage import Factors, Storage, Tensors


class PivotedStorage(Storage):
    """Pivot rows and coefficients: r^2 numbers fewer than two factors hold."""

    parameters = ("B", "C")
    indices = ("pivots",)

    def shapes(self, d_out: int, d_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"B": (rank, d_in), "C": (d_out - rank, rank), "pivots": (rank,)}

    def encode(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Pivot rows are chosen by column-pivoted QR of A^T, on the host, in float64.

        They are then well spread, which keeps the coefficients small enough for bfloat16.
        """
        import scipy.linalg

        r = A.shape[1]
        A64, B64 = A.detach().cpu().double(), B.detach().cpu().double()
        _, R, order = scipy.linalg.qr(A64.T.numpy(), mode="economic", pivoting=True)
        diagonal = abs(R.diagonal())
        if diagonal.min() <= diagonal.max() * 1e-12:
            # A of deficient rank has no r independent rows; the least-norm coefficients still serve.
            coefficients = scipy.linalg.lstsq(R[:, :r], R[:, r:])[0].T
        else:
            coefficients = scipy.linalg.solve_triangular(R[:, :r], R[:, r:]).T
        pivots, rest = torch.from_numpy(order[:r].copy()).long(), torch.from_numpy(order[r:].copy())
        return {"B": A64[pivots] @ B64, "C": torch.from_numpy(coefficients)[rest.argsort()], "pivots": pivots}

    def decode(self, tensors: Tensors) -> Factors:
        """Balanced factors in float64 of the matrix cat(B, C B)[order]."""
        place = factorising(tensors["B"].device)
        here = {suffix: tensor.detach().to(place) for suffix, tensor in tensors.items()}
        B, C, (order, _) = here["B"].double(), here["C"].double(), self.derive(here)
        one = torch.eye(len(B), dtype=B.dtype, device=B.device)
        Q, R = torch.linalg.qr(torch.cat([one, C])[order])
        rows = R @ B
        U = torch.linalg.eigh(rows @ rows.T)[1]
        return balanced(Q @ U, U.T @ rows)

    def derive(self, tensors: Tensors) -> Orders:
        return pivoted_orders(tensors["pivots"], tensors["C"].shape[0])

    def multiply(
        self, x: Tensor, tensors: Tensors, derived: Orders, products: Products = ONE_MATRIX, bias: Tensor | None = None
    ) -> Tensor:
        return multiply_pivoted(x, tensors["B"], tensors["C"], derived, products, bias)

    def product(self, tensors: Tensors, derived: Orders) -> Tensor:
        return product_pivoted(tensors["B"], tensors["C"], derived)

    def look_up(self, ids: Tensor, tensors: Tensors, derived: Orders, padding_idx: int | None = None) -> Tensor:
        return look_up_pivoted(ids, tensors["B"], tensors["C"], derived)
