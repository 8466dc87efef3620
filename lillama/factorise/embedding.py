"""What sets an embedding apart: its inputs are token counts, and most of its rows are hardly ever seen.

Token t, seen n_t times, has the vector w_t, row t of W (vocabulary x d). The best rank-r table for the calibration
text minimises sum of n_t |w_t - w'_t|^2, so a token that the text lacks would lose its meaning altogether. Every token
therefore counts for at least a share of the mean count: n_t + floor N / V, with N tokens in the text and V in the
vocabulary (`compress.embedding_floor`). The same share of the distillation's loss is taken on tokens drawn evenly
from the vocabulary, for what changes B changes the vectors of all tokens, those of unseen ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.errors import LillamaError
from lillama.factorise.initialisers import TINY, balanced, regularised

IDS = ("decoder_input_ids", "input_ids")
FREQUENT = 0.8  # share of the text that the frequent tokens make up, the most frequent first
ROUNDS = 12  # of the alternating least squares
MOST_DRAWN = 4096  # tokens of the vocabulary per step
CHUNK = 8192  # rows of W in float64 at once


def token_counts(batches: Iterable[Mapping[str, Tensor]], vocabulary: int) -> Tensor:
    """How often every token occurs in batches of model arguments, padding left out; float64 [vocabulary]."""
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for batch in batches:
        name = next((name for name in IDS if name in batch), None)
        if name is None:
            raise LillamaError("the calibration batches hold no token ids", where="calibration")
        ids = batch[name].cpu()
        for key in ("loss_mask", "decoder_attention_mask", "attention_mask"):
            mask = batch.get(key)
            if mask is not None and mask.shape == ids.shape:
                ids = ids[mask.cpu().bool()]
                break
        counts += torch.bincount(ids.reshape(-1), minlength=vocabulary)
    return counts


def floored(counts: Tensor, floor: float) -> Tensor:
    """n_t + floor N / V."""
    return counts + floor * counts.mean()


def factorise(
    initialise: Callable[..., tuple[Tensor, Tensor]],
    wanted: Iterable[str],
    W: Tensor,
    rank: int,
    arguments: Mapping[str, Any],
    counts: Tensor | None = None,
    head_gram: Tensor | None = None,
    **fisher: Tensor,
) -> tuple[Tensor, Tensor]:
    """A (vocabulary x r) and B (r x d) for the table W by an initialiser that names `wanted`.

    To the initialiser the embedding is the map W^T of one-hot vectors; its `output_gram` is the sum of w_t w_t^T over
    the floored `counts`. `head_gram` is the Gram of the inputs of a head that is tied to the embedding: with both
    statistics the factors are those of `both_uses`. `fisher`: the factors of kfac.py, of both uses together.
    """
    wanted = set(wanted)
    if fisher:
        B, A = initialise(W.T, rank, **arguments, **fisher)
    elif counts is None or not wanted & {"gram", "output_gram"}:
        B, A = initialise(W.T, rank, **arguments)
    elif "output_gram" not in wanted:
        raise LillamaError(
            "this initialiser takes the Gram of inputs, which an embedding has not",
            where="compress.init",
            hint="One that names output_gram serves, such as whitened.",
        )
    elif head_gram is not None:
        return both_uses(W, rank, counts, head_gram)
    else:
        B, A = initialise(W.T, rank, output_gram=weighted_gram(W, counts), **arguments)
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


class Watch:
    """Follows a student embedding: its loss on tokens of the whole vocabulary, and its error before and after."""

    def __init__(self, teacher: Any, student: Any, floor: float) -> None:
        self.original: Tensor = teacher.weight.detach()
        self.floor = floor
        self.before = row_errors(self.original, student.A.detach(), student.B.detach())
        self.after = self.before

    def with_all_tokens(
        self, distance: Tensor, student: nn.Module, objective: Callable[..., Tensor], tokens: int, seed: int
    ) -> Tensor:
        """The mean distance over the text and, by the floor's weight, over as many tokens drawn from the vocabulary."""
        if not self.floor:
            return distance
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, len(self.original), (min(tokens, MOST_DRAWN),), generator=generator)
        ids = ids.to(self.original.device)
        even = objective(student(ids).float(), F.embedding(ids, self.original).float()).mean()
        return (distance + self.floor * even) / (1 + self.floor)

    @torch.no_grad()
    def finish(self, student: Any) -> None:
        """Take note of the error of the finished student, which still holds two factors."""
        self.after = row_errors(self.original, student.A, student.B)

    def report(self, counts: Tensor) -> dict[str, Any]:
        """How many tokens are frequent, rare and unseen, and their mean relative errors before and after training."""
        groups = frequency_groups(counts)
        return {
            "floor": self.floor,
            "tokens": {name: int(chosen.sum()) for name, chosen in groups.items()},
            "initial_error": by_frequency(self.before, counts),
            "error": by_frequency(self.after, counts),
        }


def row_errors(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """|w_t - a_t B| / |w_t| for every token, in float32 on the host.

    A vector of nearly no length (that of padding is 0) is compared to a hundredth of the mean length instead.
    """
    lengths, gaps = [], []
    for rows, a in zip(W.split(CHUNK), A.split(CHUNK)):
        rows = rows.float()
        lengths.append(rows.norm(dim=1).cpu())
        gaps.append((rows - a.float() @ B.float()).norm(dim=1).cpu())
    length = torch.cat(lengths)
    return torch.cat(gaps) / length.clamp_min(max(float(length.mean()) / 100, TINY))


def by_frequency(errors: Tensor, counts: Tensor) -> dict[str, float]:
    """Mean relative errors of the vectors of frequent, rare and unseen tokens, and over the text (`mean`).

    Frequent are the fewest tokens that make up FREQUENT of the text, rare the others that occur in it.
    """
    groups = frequency_groups(counts)
    found = {name: float(errors[chosen].mean()) for name, chosen in groups.items() if chosen.any()}
    return found | {"mean": float((errors * counts).sum() / counts.sum().clamp_min(1))}


def frequency_groups(counts: Tensor) -> dict[str, Tensor]:
    """Masks [vocabulary] of the frequent, rare and unseen tokens."""
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[(before < FREQUENT * counts.sum()) & (counts[order] > 0)]] = True
    return {"frequent": frequent, "rare": ~frequent & (counts > 0), "unseen": counts == 0}
