"""The loss on predictions: what torch's own functions say, in chunks, with the gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lillama.pretrained import predictions


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_divergence_is_cross_entropy_and_kl(monkeypatch, share, taught, chunk):
    monkeypatch.setattr(predictions, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, 19, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(0, 19, (7,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = (1 - share) * F.cross_entropy(exact, labels, reduction="sum")
    if taught:
        wanted = teacher.double().log_softmax(-1)
        expected = expected + share * F.kl_div(exact.log_softmax(-1), wanted, reduction="sum", log_target=True)
    (expected / 5).backward()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        leaf = logits.to(dtype).detach().clone().requires_grad_()
        loss = predictions.divergence(leaf, labels, teacher.to(dtype) if taught else None, share)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
        (loss / 5).backward()
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 10)
    with torch.no_grad():
        torch.testing.assert_close(
            predictions.divergence(logits, labels, teacher if taught else None, share).double(),
            expected,
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_rows_may_have_shares_of_their_own(monkeypatch, chunk):
    monkeypatch.setattr(predictions, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, 19, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(0, 19, (7,), generator=generator)
    shares = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.7, 0.0, 1.0])
    exact = logits.double().requires_grad_()
    log_p, wanted = exact.log_softmax(-1), teacher.double().log_softmax(-1)
    apart = F.kl_div(log_p, wanted, reduction="none", log_target=True).sum(-1)
    expected = (1 - shares) @ F.nll_loss(log_p, labels, reduction="none").float() + shares @ apart.float()
    expected.backward()
    leaf = logits.clone().requires_grad_()
    loss = predictions.divergence(leaf, labels, teacher, shares)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_tokens_are_drawn_by_their_chance(monkeypatch):
    monkeypatch.setattr(predictions, "CHUNK", 12)
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(30_000, 4)
    found = predictions.draw_tokens(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(found, minlength=4) / len(found)
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.02)
