"""Initialisers: a function (W, rank, ...) -> (A, B) with A (d_out x r), B (r x d_in).

W is d_out x d_in. An initialiser that names a parameter `gram` is given H = sum of x x^T over the calibration
inputs (d_in x d_in); one that names `generator` a seeded torch.Generator. Everything is computed in
float64 and returned so; factors are balanced (equal norms per component), which changes nothing in A B but
lets one learning rate serve both.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

Factors = tuple[Tensor, Tensor]

# H is singular when inputs are fewer than their dimensions: a share of its mean eigenvalue is added.
RIDGE = 1e-4


def svd(W: Tensor, rank: int) -> Factors:
    """Truncated SVD of W, the square roots of the singular values in both factors (eq. 2)."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def random(W: Tensor, rank: int, generator: Generator) -> Factors:
    """Normal with standard deviation sqrt(1 / d_in): the baseline of Figure 5."""
    d_out, d_in = W.shape
    A = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    B = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return A.to(W.device) * d_in**-0.5, B.to(W.device) * d_in**-0.5


def whitened(W: Tensor, rank: int, gram: Tensor) -> Factors:
    """The rank-r map nearest to W on inputs with the Gram matrix `gram` (eq. 3, uncentred).

    With U_r the leading eigenvectors of W H W^T: A = U_r, B = U_r^T W. The smaller of the two equivalent
    symmetric eigenproblems is solved (d_out x d_out, or d_in x d_in through a Cholesky factor of H).
    """
    W = W.double()
    H = regularised(gram)
    d_out, d_in = W.shape
    if d_out <= d_in:
        _, vectors = torch.linalg.eigh(W @ H @ W.T)
        U = vectors.flip(1)[:, :rank]
    else:
        M = W @ torch.linalg.cholesky(H)  # M M^T = W H W^T
        values, vectors = torch.linalg.eigh(M.T @ M)
        lengths = values.flip(0)[:rank].clamp_min(values.max() * 1e-14 + 1e-300).sqrt()
        U, _ = torch.linalg.qr((M @ vectors.flip(1)[:, :rank]) / lengths)
    return balanced(U, U.T @ W)


def regularised(gram: Tensor) -> Tensor:
    """H in float64, symmetric and positive definite (a ridge of RIDGE times its mean eigenvalue)."""
    H = gram.double()
    H = (H + H.T) / 2
    mean = H.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return H + RIDGE * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)


def balanced(A: Tensor, B: Tensor) -> Factors:
    """The same product with |column i of A| = |row i of B|."""
    a, b = A.norm(dim=0), B.norm(dim=1)
    scale = (b / a.clamp_min(1e-300)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return A * scale, B / scale[:, None]
