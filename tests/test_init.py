"""Initialisers against float64 references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lillama.factorise import initialisers as init


def problem(d_out=12, d_in=9, tokens=200, seed=0):
    torch.manual_seed(seed)
    W = torch.randn(d_out, d_in, dtype=torch.float64)
    X = torch.randn(d_in, d_in, dtype=torch.float64) @ torch.randn(d_in, tokens, dtype=torch.float64)
    return W, X


def test_svd_is_the_best_low_rank_matrix():
    W, _ = problem()
    A, B = init.svd(W.float(), 5)
    S = torch.linalg.svdvals(W)
    assert (W - A @ B).square().sum() == pytest.approx(float(S[5:].square().sum()), rel=1e-5)
    # The square roots of the singular values stand in both factors (eq. 2).
    torch.testing.assert_close(A.norm(dim=0), S[:5].sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.norm(dim=1), S[:5].sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
@given(rank=st.integers(1, 9), seed=st.integers(0, 50))
def test_whitened_is_the_best_low_rank_map_of_these_inputs(shape, rank, seed):
    W, X = problem(*shape, seed=seed)
    A, B = init.whitened(W, rank, X @ X.T)
    # Eckart-Young on the outputs: no rank-r map comes closer to W X than the tail of its singular values.
    least = torch.linalg.svdvals(W @ X)[rank:].square().sum()
    error = ((W - A @ B) @ X).square().sum()
    assert error <= least * 1.001 + 1e-6 * (W @ X).square().sum()
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))


def test_whitened_survives_fewer_inputs_than_dimensions_and_no_inputs_at_all():
    W, X = problem(tokens=3)
    for gram in (X @ X.T, torch.zeros(9, 9)):
        A, B = init.whitened(W, 4, gram)
        assert torch.isfinite(A @ B).all()
    A, B = init.whitened(W, 4, X @ X.T)
    assert ((W - A @ B) @ X).norm() / (W @ X).norm() < 1e-2


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_asvd_is_the_truncated_svd_of_weighed_columns(shape):
    W, X = problem(*shape)
    X[2] *= 30
    size = X.square().sum(1)
    S = (size + init.RIDGE * size.mean()) ** 0.25
    U, values, V = torch.linalg.svd(W * S, full_matrices=False)
    A, B = init.asvd(W, 4, X @ X.T)
    torch.testing.assert_close(A @ B, U[:, :4] * values[:4] @ V[:4] / S)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))
    assert torch.isfinite(torch.cat([part.flatten() for part in init.asvd(W, 4, torch.zeros(len(X), len(X)))])).all()


def test_full_rank_is_exact():
    for shape in ((12, 9), (9, 12)):
        W, X = problem(*shape)
        for A, B in (init.svd(W, 9), init.whitened(W, 9, X @ X.T), init.asvd(W, 9, X @ X.T)):
            torch.testing.assert_close(A @ B, W)


def test_random_is_seeded_and_of_the_paper_s_size():
    W = torch.zeros(400, 900)
    first, second = (init.random(W, 64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1].std() == pytest.approx(900**-0.5, rel=0.05)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@given(rank=st.integers(1, 9), seed=st.integers(0, 20))
def test_compensated_makes_up_for_what_the_inputs_lost(shape, rank, seed):
    W, X = problem(*shape, seed=seed)
    lost = X + 0.3 * X.std() * torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(seed))
    A, B = init.compensated(W, rank, lost @ lost.T, X @ lost.T)
    # The part of W X that lies in the span of the rows of the inputs is all a map can reach; of it, rank r keeps the
    # leading singular values.
    reachable = W @ X @ torch.linalg.pinv(lost) @ lost
    least = (W @ X - reachable).square().sum() + torch.linalg.svdvals(reachable)[rank:].square().sum()
    error = (W @ X - A @ B @ lost).square().sum()
    assert error <= least * 1.002 + 1e-6 * (W @ X).square().sum()
    plain = torch.matmul(*init.whitened(W, rank, lost @ lost.T)) @ lost
    assert error <= (W @ X - plain).square().sum() * (1 + 1e-6)


def test_compensated_is_whitened_where_nothing_was_lost():
    W, X = problem()
    ours, plain = init.compensated(W, 5, X @ X.T, X @ X.T), init.whitened(W, 5, X @ X.T)
    torch.testing.assert_close(ours[0] @ ours[1], plain[0] @ plain[1], rtol=1e-4, atol=1e-4)
