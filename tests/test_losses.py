"""Objectives against the formula, written out token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lillama.distill import losses


def pair():
    torch.manual_seed(0)
    return torch.randn(2, 3, 5), torch.randn(2, 3, 5)


def test_l1_logcos_is_equation_7():
    y_student, y = pair()
    got = losses.l1_logcos(y_student, y)
    for b in range(2):
        for t in range(3):
            a, c = y[b, t].double(), y_student[b, t].double()
            cosine = float(a @ c / (a.norm() * c.norm()))
            expected = float((a - c).abs().sum()) / 5 - math.log(1 / (1 + math.exp(-cosine)))
            assert float(got[b, t]) == pytest.approx(expected, rel=1e-5)


def test_normalised_mse_does_not_see_the_scale_of_a_token():
    y_student, y = pair()
    scale = torch.tensor([1.0, 1e3, 1e-2])[None, :, None]
    torch.testing.assert_close(losses.normalised_mse(y_student * scale, y * scale), losses.normalised_mse(y_student, y))
    torch.testing.assert_close(losses.mse(y_student, y), (y_student - y).pow(2).mean(-1))


def test_padding_does_not_count():
    distance = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert float(losses.token_mean(distance, mask)) == pytest.approx(2.0)
    assert float(losses.token_mean(distance, None)) == pytest.approx(float(distance.mean()))
    assert float(losses.token_mean(distance, torch.zeros(2, 3))) == 0.0


def test_teacher_student_is_the_sum_of_the_two():
    a, b = torch.tensor(1.25), torch.tensor(0.5)
    assert losses.teacher_student(a, b) == losses.teacher(a) + losses.student(b)
