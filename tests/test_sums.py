"""Sums of squares that are made on and above the diagonal alone, against the whole squares in float64."""

from __future__ import annotations

import pytest
import torch

from lillama.factorise.sums import BLOCK, Sums, add_symmetric, mirrored


@pytest.mark.parametrize("columns", [1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 7])
def test_a_sum_of_squares_is_whole_once_it_is_mirrored(columns):
    generator = torch.Generator().manual_seed(0)
    total, expected = torch.zeros(columns, columns, dtype=torch.float64), 0
    for rows in (5, 3):
        x, counts = torch.randn(rows, columns, generator=generator), torch.rand(rows, 1, generator=generator)
        add_symmetric(total, x * counts, x)
        expected = expected + (x * counts).double().T @ x.double()
    torch.testing.assert_close(mirrored(total), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mirrored(total), mirrored(total).T)


@pytest.mark.parametrize("shape", [(2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK)])
def test_both_factors_of_a_weight_with_more_rows_than_a_block(shape):
    """G and H on the smaller side, and the one on the larger, from their definitions."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator) / 10
    sums, tokens = Sums(W, both=True), 12
    batches = [(torch.randn(6, shape[1], generator=generator), torch.randn(6, shape[0], generator=generator))] * 2
    H, G, counted = 0, 0, 0.0
    for x, g in batches:
        sums.add(x, g)
        length = g.double().square().sum(-1, keepdim=True)
        c = length / (length + length.mean())
        H, G, counted = H + (x.double() * c).T @ x.double(), G + g.double().T @ g.double(), counted + float(c.sum())
    H, G, W = H / counted, G / tokens, W.double()
    wide = shape[0] <= shape[1]
    expected = (W @ H @ W.T, G) if wide else (H, W.T @ G @ W)
    for found, one in zip(sums.factors(tokens), expected):
        torch.testing.assert_close(found.double(), one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.larger_factor(tokens), H if wide else G, rtol=1e-4, atol=1e-4)
