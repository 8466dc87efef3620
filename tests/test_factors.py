"""Factor modules compute what their matrices say, and cost what the plan says."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lillama import LillamaError, Weight
from lillama.lowrank import swap as factors
from lillama.lowrank.conversions import use_trainable_storage
from lillama.lowrank.counts import stored
from lillama.lowrank.factors import balanced
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.storage import get_storage

STORAGES = ["factors", "pivoted"]


def linear(storage, d_in, d_out, rank, bias=False):
    return LowRankLinear(get_storage(storage), d_in, d_out, rank, bias)


def low_rank(storage, d_out=11, d_in=7, rank=4, bias=True):
    torch.manual_seed(1)
    module = linear(storage, d_in, d_out, rank, bias)
    A, B = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    module.set_factors(A, B)
    if bias:
        nn.init.normal_(module.bias)
    return module, A @ B


@pytest.mark.parametrize("storage", STORAGES)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_every_shape_and_rank(storage, d_out, d_in, data):
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    module, W = low_rank(storage, d_out, d_in, rank)
    x = torch.randn(3, 2, d_in)
    expected = x.double() @ W.T + module.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.weight.double(), W, rtol=1e-3, atol=1e-4)
    numbers = sum(p.numel() for n, p in module.named_parameters() if n != "bias")
    assert numbers == stored(Weight("w", (d_out, d_in)), rank, storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_agree_with_float64_finite_differences(storage):
    module, _ = low_rank(storage, bias=True)
    module = module.double()
    names, values = zip(*module.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_weight_property_carries_gradients(storage):
    # Mamba's fused kernels read out_proj.weight and bypass the module.
    module, _ = low_rank(storage, bias=False)
    x = torch.randn(5, 7)
    module(x).square().sum().backward()
    through_forward = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    nn.functional.linear(x, module.weight).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, through_forward[name], rtol=1e-4, atol=1e-4)


def test_pivot_coefficients_stay_small_enough_for_bfloat16():
    # Fast decay is the hard case: a bad choice of rows would need huge coefficients.
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(256, 96, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(128, 96, dtype=torch.float64))
    S = torch.logspace(0, -4, 96, dtype=torch.float64)
    W = (U * S) @ V.T
    module = linear("pivoted", 128, 256, 96)
    module.set_factors(U * S.sqrt(), S.sqrt()[:, None] * V.T)
    assert module.C.abs().max() < 20
    x = torch.randn(64, 128, dtype=torch.float64)

    @torch.no_grad()
    def error(m):
        return float((m.weight.double() @ x.T - W @ x.T).norm() / (W @ x.T).norm())

    plain = linear("factors", 128, 256, 96)
    plain.set_factors(*balanced(U * S.sqrt(), S.sqrt()[:, None] * V.T))
    assert error(module.bfloat16()) < 3 * error(plain.bfloat16())


def test_pivoting_a_matrix_of_deficient_rank_is_exact_too():
    A = torch.ones(6, 3, dtype=torch.float64)
    module = linear("pivoted", 4, 6, 3)
    B = torch.randn(3, 4, dtype=torch.float64)
    module.set_factors(A, B)
    assert torch.isfinite(module.C).all()
    torch.testing.assert_close(module.weight.double(), A @ B, rtol=1e-4, atol=1e-5)


def test_a_copied_or_moved_pivoted_module_keeps_its_order():
    module, W = low_rank("pivoted", bias=False)
    module(torch.randn(1, 7))  # fills the derived order
    other = copy.deepcopy(module)
    A, B = torch.randn(11, 4), torch.randn(4, 7)
    other.set_factors(A, B)
    torch.testing.assert_close(other.weight, A @ B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.weight.double(), W, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_loading_a_state_dict_of_another_matrix(storage):
    first, _ = low_rank(storage, bias=False)
    second = linear(storage, 7, 11, 4)
    second(torch.randn(1, 7))  # a stale derived order must not survive the load
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 7)
    assert torch.equal(first(x), second(x))


def test_replace_keeps_bias_and_refuses_what_is_not_a_linear():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    bias = model[0].bias
    new = factors.replace(model, "0", kind="linear", storage="factors", rank=2)
    assert model[0] is new
    assert new.bias is bias
    with pytest.raises(LillamaError, match="LayerNorm"):
        factors.replace(model, "1", kind="linear", storage="factors", rank=2)
    with pytest.raises(LillamaError, match="no storage is called 'zip'"):
        factors.replace(nn.Sequential(nn.Linear(4, 6)), "0", kind="linear", storage="zip", rank=2)


@given(st.integers(0, 20), st.booleans())
def test_a_pivoted_linear_trains_as_balanced_factors_of_the_same_matrix(seed, bias):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(9, 12, bias=bias), torch.nn.Linear(12, 7, bias=bias))
    for name in ("0", "1"):
        factors.replace(model, name, kind="linear", storage="pivoted", rank=4)
        shape = (model[int(name)].out_features, 4), (4, model[int(name)].in_features)
        model[int(name)].set_factors(*map(torch.randn, shape))
    x = torch.randn(5, 9)
    before = model(x)
    assert use_trainable_storage(model) == [("0", "linear", "pivoted"), ("1", "linear", "pivoted")]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].A.norm(dim=0), model[0].B.norm(dim=1), rtol=1e-4, atol=1e-4)
    for name in ("0", "1"):
        factors.store_as(model, name, "linear", "pivoted")
    assert model[0].storage.name == "pivoted" and set(model[0].state_dict()) >= {"B", "C", "pivots"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
