"""Initialisers: a function (W, rank, ...) -> (A, B) with A (d_out x r), B (r x d_in).

W is d_out x d_in. Statistics are given to an initialiser that names them: `gram`, H = sum of x x^T over the calibration
inputs (d_in x d_in); `output_gram`, the same sum of W x x^T W^T over the outputs, bias left out (d_out x d_out). One
that names both gets the one that is smaller and cheaper, and None for the other. One that names `gram` and `cross` gets
those of the student's inputs x' and of both, sums of x' x'^T and of x x'^T (refit.py). One that names `generator` gets
a seeded torch.Generator. Everything is computed in float64 and returned so; factors are balanced (equal norms per
component), which changes nothing in A B but lets one learning rate serve both.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lillama.lowrank.factors import balanced
from lillama.lowrank.storage import Factors

# H is singular when inputs are fewer than their dimensions: a share of its mean eigenvalue is added.
RIDGE = 1e-4
# Directions that the few tokens measured did not show, on either side of a weight, are not free to go wrong: what is
# found on the tokens measured costs up to twice as much on others (docs/results/quality.md).
OUTPUT_RIDGE, INPUT_RIDGE = 5e-2, 5e-2
TINY = torch.finfo(torch.float32).tiny


def svd(W: Tensor, rank: int) -> Factors:
    """Truncated SVD of W, the square roots of the singular values in both factors (eq. 2).

    From the eigenvectors of the smaller of W W^T and W^T W: as exact as a full SVD as long as sigma_r is not below
    1e-7 of the largest, and several times faster (benchmarks/factorise.py). At full rank W is reproduced whatever
    the eigenvectors, since they are orthogonal.
    """
    W = W.double()
    if len(W) <= W.shape[1]:
        U = torch.linalg.eigh(W @ W.T)[1].flip(1)[:, :rank]
        return balanced(U, U.T @ W)
    V = torch.linalg.eigh(W.T @ W)[1].flip(1)[:, :rank]
    return balanced(W @ V, V.T)


def random(W: Tensor, rank: int, generator: Generator) -> Factors:
    """Normal with standard deviation sqrt(1 / d_in): the baseline of Figure 5."""
    d_out, d_in = W.shape
    A = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    B = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return Factors(A.to(W.device) * d_in**-0.5, B.to(W.device) * d_in**-0.5)


def whitened(W: Tensor, rank: int, gram: Tensor | None = None, output_gram: Tensor | None = None) -> Factors:
    """The rank-r map nearest to W on inputs with the Gram matrix `gram` (eq. 3, uncentred).

    With U_r the leading eigenvectors of W H W^T: A = U_r, B = U_r^T W. That matrix is the Gram of the outputs, which
    may be given instead. The smaller of the two equivalent symmetric eigenproblems is solved (d_out x d_out, or
    d_in x d_in through a Cholesky factor of H).
    """
    W = W.double()
    d_out, d_in = W.shape
    if output_gram is not None:
        M = (output_gram.double() + output_gram.double().T) / 2
        white = W @ W.T
        mean = (M.trace() / white.trace().clamp_min(TINY)).clamp_min(TINY)
        _, vectors = torch.linalg.eigh(M + RIDGE * mean * white)
        U = vectors.flip(1)[:, :rank]
        return balanced(U, U.T @ W)
    if gram is None:
        raise TypeError("whitened() needs gram or output_gram")
    H = regularised(gram)
    if d_out <= d_in:
        _, vectors = torch.linalg.eigh(W @ H @ W.T)
        U = vectors.flip(1)[:, :rank]
    else:
        M = W @ torch.linalg.cholesky(H)  # M M^T = W H W^T
        values, vectors = torch.linalg.eigh(M.T @ M)
        lengths = values.flip(0)[:rank].clamp_min(values.max() * 1e-14 + 1e-300).sqrt()
        U, _ = torch.linalg.qr((M @ vectors.flip(1)[:, :rank]) / lengths)
    return balanced(U, U.T @ W)


def asvd(W: Tensor, rank: int, gram: Tensor) -> Factors:
    """Truncated SVD of W with every input times the square root of its usual size (ASVD, arXiv 2312.05821, alpha 0.5).

    With S = diag(H)^(1/4), `svd` of W S = A B, and B S^-1: what an input of large numbers needs is kept before others.
    """
    size = gram.double().diagonal()
    S = (size + RIDGE * size.mean().clamp_min(TINY)) ** 0.25
    A, B = svd(W.double() * S, rank)
    return balanced(A, B / S)


def fisher(W: Tensor, rank: int, input_fisher: Tensor, output_fisher: Tensor) -> Factors:
    """The rank-r map whose errors E cost the predictions least: tr(G E H E^T), H and G the factors of sensitivity.py.

    Both are given on the smaller side. Where that is the output, W H W^T and G = T^T T: with U the leading
    eigenvectors of T (W H W^T) T^T, A = T^-1 U and B = U^T T W. Where it is the input, H = L L^T and W^T G W: with V
    those of L^T (W^T G W) L, A = W L V and B = V^T L^-1.
    """
    W = W.double()
    M, whitening = _weighed(W, input_fisher, output_fisher)
    U = torch.linalg.eigh(M)[1].flip(1)[:, :rank]
    if len(W) <= W.shape[1]:
        return balanced(torch.linalg.solve_triangular(whitening, U, upper=True), U.T @ (whitening @ W))
    return balanced(W @ (whitening @ U), torch.linalg.solve_triangular(whitening.T, U, upper=True).T)


def fisher_spectrum(W: Tensor, input_fisher: Tensor, output_fisher: Tensor) -> Tensor:
    """The eigenvalues of `fisher`, falling: twice what leaving each component out costs, in nats per token."""
    M, _ = _weighed(W.double(), input_fisher, output_fisher)
    return torch.linalg.eigvalsh(M).flip(0).clamp_min(0)


def _weighed(W: Tensor, input_fisher: Tensor, output_fisher: Tensor) -> tuple[Tensor, Tensor]:
    """(the matrix of `fisher`'s eigenproblem, its T or L)."""
    if len(W) <= W.shape[1]:
        T = torch.linalg.cholesky(regularised(output_fisher, OUTPUT_RIDGE), upper=True)
        return T @ _far_regularised(input_fisher, W @ W.T, INPUT_RIDGE) @ T.T, T
    L = torch.linalg.cholesky(regularised(input_fisher, INPUT_RIDGE))
    return L.T @ _far_regularised(output_fisher, W.T @ W, OUTPUT_RIDGE) @ L, L


def _far_regularised(inner: Tensor, outer: Tensor, ridge: float) -> Tensor:
    """W H W^T with a ridge for H, whose trace is not known on this side: `outer` is W W^T, as of equal directions."""
    inner = inner.double()
    return inner + ridge * inner.trace() / outer.trace().clamp_min(TINY) * outer


def compensated(W: Tensor, rank: int, gram: Tensor, cross: Tensor) -> Factors:
    """The rank-r map that brings the student's inputs X' nearest to W X, the original's outputs (DESIGN 6).

    `gram` is X' X'^T, `cross` is X X'^T. The best map of any rank is T = W C H'^-1; what rank r can keep of it on
    these inputs is `whitened` of T. The ridge pulls T towards W.
    """
    ridge = RIDGE * gram.double().diagonal().mean().clamp_min(TINY)
    C = cross.double() + ridge * torch.eye(len(cross), dtype=torch.float64, device=cross.device)
    T = torch.linalg.solve(regularised(gram), (W.double() @ C).T).T
    return whitened(T, rank, gram=gram)


def through(W: Tensor, square: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """W S W^T of a symmetric S in `dtype`, its larger product in float32, in which squares were summed up."""
    return W.to(dtype) @ (square.float() @ W.T.float()).to(dtype)


def regularised(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """H in float64, symmetric and positive definite (a ridge of `ridge` times its mean eigenvalue is added)."""
    H = gram.double()
    H = (H + H.T) / 2
    mean = H.diagonal().mean().clamp_min(TINY)
    return H + ridge * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
