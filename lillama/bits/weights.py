"""How the tensors of one low-rank matrix are rounded: what the first of them loses the second makes up for.

B is rounded by H of its inputs and A^T G A. Then A, or the coefficients C, are the best for the B that came out, in
closed form, and are rounded by what reaches them, B H B^T, and G. Two factors may first be turned into others with the
same product: such that errors of every row of B, and of every column of A, matter alike, and that no number is much
larger than others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lillama.base.device import factorising
from lillama.bits.compensate import OUTPUT_DAMPING, round_compensated
from lillama.bits.moments import Moments
from lillama.lowrank.coded import round_nearest, spread
from lillama.lowrank.rounded import Rounded

RIDGE = 1e-6  # of the mean diagonal, where B H B^T is inverted
OUTPUT_RIDGE, INPUT_RIDGE = 1e-2, 1e-4  # the same of G and of H, where factors are turned
SEED = 0  # of the rotation; another one is as good

Pair = tuple[Tensor, Tensor]  # codes and scales
Tensors = dict[str, Tensor]


def round_matrix(storage: Rounded, tensors: Tensors, known: Moments | None) -> Tensors:
    """What `storage` keeps of the tensors of its format, on the CPU; `known` None: every number for itself."""
    rounder = ROUNDERS.get(storage.base.name)
    if known is None or rounder is None:
        return storage.kept({suffix: t.detach().cpu() for suffix, t in tensors.items()})
    place = factorising(known.inputs.device)
    here = {suffix: tensor.detach().to(place) for suffix, tensor in tensors.items()}
    floats = {suffix: here[suffix].float() for suffix in storage.base.parameters}
    moments = Moments(known.inputs.to(place), known.outputs.to(place))
    rounded = rounder(storage, here | floats, moments)
    indices = {suffix: here[suffix] for suffix in storage.base.indices}
    return {suffix: tensor.cpu() for suffix, tensor in (storage.packed(rounded) | indices).items()}


def _dense(storage: Rounded, tensors: Tensors, known: Moments) -> dict[str, Pair]:
    return {"W": round_compensated(tensors["W"], known.inputs, storage.bits, storage.group, known.outputs)}


def _factors(storage: Rounded, tensors: Tensors, known: Moments) -> dict[str, Pair]:
    A, B = turned(tensors["A"], tensors["B"], known)
    first = round_compensated(B, known.inputs, storage.bits, storage.group, A.T @ known.outputs @ A)
    A, gram = _refitted(A, B, _whole(first, storage.group), known.inputs)
    return {"A": round_compensated(A, gram, storage.bits, storage.group, known.outputs), "B": first}


def _pivoted(storage: Rounded, tensors: Tensors, known: Moments) -> dict[str, Pair]:
    B, C, (order, inverse) = tensors["B"], tensors["C"], storage.base.derive(tensors)
    G, one = known.outputs, torch.eye(len(B), dtype=B.dtype, device=B.device)
    A = torch.cat([one, C])[order]
    first = round_compensated(B, known.inputs, storage.bits, storage.group, A.T @ G @ A)
    if not len(C):
        return {"B": first, "C": round_nearest(C, storage.bits, storage.group)}
    others = inverse[len(B) :]
    own = G[others][:, others]
    # What the other rows are to add to themselves for each error of the pivots, to make up for it by G.
    damped = own + torch.eye(len(own), dtype=G.dtype, device=G.device) * _share(own, OUTPUT_DAMPING)
    answer = torch.linalg.solve(damped, G[others][:, inverse[: len(B)]])
    C, gram = _refitted(C + answer, B, _whole(first, storage.group), known.inputs)
    return {"B": first, "C": round_compensated(C - answer, gram, storage.bits, storage.group, own)}


ROUNDERS: dict[str, Callable[[Rounded, Tensors, Moments], dict[str, Pair]]] = {
    "dense": _dense,
    "factors": _factors,
    "pivoted": _pivoted,
}


def _whole(rounded: Pair, group: int) -> Tensor:
    codes, scales = rounded
    return codes * spread(scales, group, codes.shape[1])


def _refitted(A: Tensor, B: Tensor, rounded: Tensor, H: Tensor) -> Pair:
    """(A', B' H B'^T) with the A' for which tr((A B - A' B') H (A B - A' B')^T) is least, B' being `rounded`.

    In directions that too few inputs were seen in, A' stays what A is.
    """
    A64, B64, H64 = A.double(), rounded.double(), H.double()
    BH = B64 @ H64
    gram = BH @ B64.T
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    missing = BH @ (A64 @ (B.double() - B64)).T
    return (A64 + torch.linalg.solve(gram + one * _share(gram, RIDGE), missing).T).float(), gram.float()


def _share(gram: Tensor, share: float) -> Tensor:
    """A share of the mean diagonal of a Gram matrix, never nothing."""
    return (share * gram.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)


def turned(A: Tensor, B: Tensor, known: Moments) -> Pair:
    """Factors with the same product whose errors matter alike, turned so that no number stands out.

    With G = L L^T, H = M M^T and L^T A B M = U S V^T, the columns of L^T A become those of U S^1/2 and the rows of B M
    those of S^1/2 V^T; then both are turned by one random rotation.
    """
    A, B = A.double(), B.double()
    L, M = _root(known.outputs, OUTPUT_RIDGE), _root(known.inputs, INPUT_RIDGE)
    (Qa, Qb), (U, S, Vt) = _singular(L.T @ A, (B @ M).T)
    size = S.sqrt().clamp_min(S.max().sqrt() * 1e-6 + torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(len(S), len(S), dtype=A.dtype, generator=generator)  # the same on every device
    rotation = torch.linalg.qr(drawn.to(A.device))[0]
    left = torch.linalg.solve_triangular(L.T, Qa @ (U * size), upper=True)
    right = torch.linalg.solve_triangular(M.T, (Qb @ Vt.T) * size, upper=True)
    return (left @ rotation).float(), (right @ rotation).T.float()


def least_component(A: Tensor, B: Tensor, known: Moments) -> float:
    """What the least of the components of A B costs to leave out, in nats per token: S_r^2 / 2 (see `turned`)."""
    L, M = _root(known.outputs, OUTPUT_RIDGE), _root(known.inputs, INPUT_RIDGE)
    _, (_, S, _) = _singular(L.T @ A.double().to(L.device), (B.double().to(M.device) @ M).T)
    return float(S.min().square() / 2)


def _singular(left: Tensor, right: Tensor) -> tuple[Pair, tuple[Tensor, Tensor, Tensor]]:
    """((Qa, Qb), (U, S, V^T)) with left right^T = Qa U S V^T Qb^T."""
    Qa, Ra = torch.linalg.qr(left)
    Qb, Rb = torch.linalg.qr(right)
    return (Qa, Qb), torch.linalg.svd(Ra @ Rb.T)


def _root(gram: Tensor, ridge: float) -> Tensor:
    """The lower Cholesky factor of a Gram matrix, with a share of its mean diagonal added."""
    gram = gram.double()
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + one * _share(gram, ridge))
