"""A low-rank matrix as some of its own rows and the coefficients of the others in them (PIFA, arXiv 2501.19090)."""

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


Factors = tuple[Tensor, Tensor]


def balanced(A: Tensor, B: Tensor) -> Factors:
    """The same product with |column i of A| = |row i of B|."""
    a, b = A.norm(dim=0), B.norm(dim=1)
    scale = (b / a.clamp_min(1e-300)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return A * scale, B / scale[:, None]
