"""What sets an embedding apart: its inputs are token counts, and most of its rows are hardly ever seen.

Token t, seen n_t times, has the vector w_t, row t of W (vocabulary x d). The best rank-r table for the calibration
text minimises sum of n_t |w_t - w'_t|^2, so a token that the text lacks would lose its meaning altogether. Every token
therefore counts for at least a share of the mean count: n_t + floor N / V, with N tokens in the text and V in the
vocabulary (`compress.embedding_floor`). The same share of the distillation's loss is taken on tokens drawn evenly
from the vocabulary, for what changes B changes the vectors of all tokens, those of unseen ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lillama.errors import LillamaError
from lillama.factorise.initialisers import TINY, regularised
from lillama.factorise.known import WeightStatistics
from lillama.lowrank.factors import balanced
from lillama.pretrained.calls import find_mask

IDS = ("decoder_input_ids", "input_ids")
ROUNDS = 12  # of the alternating least squares
CHUNK = 8192  # rows of W in float64 at once


def token_counts(batches: Iterable[Mapping[str, Tensor]], vocabulary: int) -> Tensor:
    """How often every token occurs in batches of model arguments, padding left out; float64 [vocabulary]."""
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for batch in batches:
        name = next((name for name in IDS if name in batch), None)
        if name is None:
            raise LillamaError("the calibration batches hold no token ids", where="calibration")
        ids = batch[name].cpu()
        mask = find_mask(batch, ids.shape)
        if mask is not None:
            ids = ids[mask.cpu().bool()]
        counts += torch.bincount(ids.reshape(-1), minlength=vocabulary)
    return counts


def floored(counts: Tensor, floor: float) -> Tensor:
    """n_t + floor N / V."""
    return counts + floor * counts.mean()


def factorise(
    start: Callable[[Tensor, int, WeightStatistics], tuple[Tensor, Tensor]],
    names: frozenset[str],
    W: Tensor,
    rank: int,
    known: WeightStatistics,
) -> tuple[Tensor, Tensor]:
    """A (vocabulary x r) and B (r x d) for the table W by an initialiser that names `names`, called as `start`.

    To the initialiser the embedding is the map W^T of one-hot vectors; its `output_gram` is the sum of w_t w_t^T over
    the floored counts. With counts and the Gram of the inputs of a head that is tied to the embedding the factors are
    those of `both_uses`. The factors of the Fisher information (kfac.py) are of both uses together.
    """
    if known.known(("input_fisher", "output_fisher")) or known.counts is None or not names & {"gram", "output_gram"}:
        B, A = start(W.T, rank, known)
    elif "output_gram" not in names:
        raise LillamaError(
            "this initialiser takes the Gram of inputs, which an embedding has not",
            where="compress.init",
            hint="One that names output_gram serves, such as whitened.",
        )
    elif known.head_gram is not None:
        return both_uses(W, rank, known.counts, known.head_gram)
    else:
        B, A = start(W.T, rank, WeightStatistics(output_gram=weighted_gram(W, known.counts)))
    return A.T, B.T


def weighted_gram(W: Tensor, counts: Tensor) -> Tensor:
    """W^T diag(counts) W in float64 (d x d), a chunk of rows at a time."""
    counts = counts.to(W.device)
    gram = W.new_zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    for rows, n in zip(W.split(CHUNK), counts.split(CHUNK)):
        rows = rows.double()
        gram += rows.T @ (rows * n[:, None])
    return gram


def both_uses(W: Tensor, rank: int, counts: Tensor, head_gram: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a table that is also the head: the least sum of the relative errors of both uses.

    Minimises sum_t (w_t - a_t B) M_t (w_t - a_t B)^T with M_t = n_t / E I + H / F, where H is the Gram of the head's
    inputs, E = sum n_t |w_t|^2 and F = tr(W H W^T): the errors of the vectors looked up and of the logits, each a share
    of what there is. By alternating least squares, both steps exact: rows share the two matrices of which M_t is made,
    so one generalised eigenproblem solves for all of A, another for B. Starts at the best table for looking up alone.
    """
    W = W.double()
    H = regularised(head_gram.to(W.device))
    n = counts.to(W.device, torch.float64)
    n = n / (n * W.square().sum(1)).sum().clamp_min(TINY)
    H = H / (W @ H * W).sum().clamp_min(TINY)
    values, vectors = torch.linalg.eigh(H)
    B = torch.linalg.eigh(weighted_gram(W, n))[1].flip(1)[:, :rank].T
    WH, nW = W @ H, W * n[:, None]
    for _ in range(ROUNDS):
        A = _rows(B, n, H, nW, WH)
        B = _columns(A, n, values, vectors, A.T @ nW + A.T @ WH)
    return balanced(_rows(B, n, H, nW, WH), B)


def _rows(B: Tensor, n: Tensor, H: Tensor, nW: Tensor, WH: Tensor) -> Tensor:
    """Every a_t for given B: (n_t B B^T + B H B^T) a_t = B M_t w_t."""
    scale, basis = _pencil(B @ B.T, B @ H @ B.T)  # basis^T (B H B^T) basis = I, basis^T (B B^T) basis = diag(scale)
    right = (nW + WH) @ B.T @ basis
    return (right / (n[:, None] * scale + 1)) @ basis.T


def _columns(A: Tensor, n: Tensor, values: Tensor, vectors: Tensor, right: Tensor) -> Tensor:
    """B for given A: (A^T D A) B + (A^T A) B H = A^T D W + A^T W H, in the eigenbasis of H."""
    scale, basis = _pencil(A.T @ A, A.T @ (A * n[:, None]))
    solved = (basis.T @ right @ vectors) / (1 + scale[:, None] * values)
    return basis @ solved @ vectors.T


def _pencil(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, basis) with basis^T Q basis = I and basis^T P basis = diag(scale), for P, Q positive definite."""
    ridge = Q.diagonal().mean() * 1e-10 * torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    L = torch.linalg.cholesky(_symmetric(Q) + ridge)
    inner = torch.linalg.solve_triangular(
        L, torch.linalg.solve_triangular(L, _symmetric(P), upper=False).T, upper=False
    )
    scale, vectors = torch.linalg.eigh(_symmetric(inner))
    return scale.clamp_min(0), torch.linalg.solve_triangular(L.T, vectors, upper=True)


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.T) / 2
