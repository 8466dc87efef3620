"""Few bits: what compensated rounding promises, what it knows of a model, and which form a weight takes."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from test_mixtral import tiny as tiny_mixtral

from lillama.base.device import choose
from lillama.base.progress import Progress
from lillama.bits import compensate, moments
from lillama.bits.apply import quantise_, quantise_ends_
from lillama.bits.compensate import refit_scales, round_compensated
from lillama.bits.moments import Moments, Reading, Wanted, gather
from lillama.bits.stage import quantise_model
from lillama.bits.targets import find_targets
from lillama.bits.weights import least_component, round_matrix, turned
from lillama.checkpoint.quantizer import factorise_
from lillama.errors import LillamaError
from lillama.lowrank.coded import round_nearest, spread
from lillama.lowrank.storage import get_storage
from lillama.lowrank.swap import factor_modules
from lillama.recipe.schema import Quantize

D_OUT, D_IN, RANK = 48, 64, 24


def gram(n: int, seed: int) -> torch.Tensor:
    """A Gram matrix whose directions differ a hundredfold in size, none of them along an axis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    X = torch.randn(4 * n, n, generator=generator) * torch.logspace(0, -2, n) @ basis
    return X.T @ X / len(X)


def problem() -> tuple[torch.Tensor, torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(7)
    A, B = torch.randn(D_OUT, RANK, generator=generator), torch.randn(RANK, D_IN, generator=generator)
    return A, B, Moments(gram(D_IN, 1), gram(D_OUT, 2))


def cost(E: torch.Tensor, known: Moments) -> float:
    return float(((known.outputs @ E @ known.inputs) * E).sum())


@pytest.mark.parametrize("base", ["dense", "factors", "pivoted"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_one_number_loses_others_make_up_for(base, bits):
    A, B, known = problem()
    storage = get_storage(f"{base}:{bits}:32")
    tensors = storage.base.encode(A, B)
    costs = []
    for given in (None, known):
        rounded = round_matrix(storage, dict(tensors), given)
        costs.append(cost(storage.product(rounded, storage.derive(rounded)) - A @ B, known))
    assert costs[1] < costs[0] / 2


@pytest.mark.parametrize("base", ["dense", "factors", "pivoted"])
def test_rows_make_up_for_rows(monkeypatch, base):
    """Where the outputs' errors come together, less is lost in all than where every row minds itself alone."""
    generator = torch.Generator().manual_seed(7)
    A, B = torch.randn(160, RANK, generator=generator), torch.randn(RANK, D_IN, generator=generator)
    known = Moments(gram(D_IN, 1), gram(160, 2))
    storage = get_storage(f"{base}:4:32")
    tensors = storage.base.encode(A, B)
    costs = []
    for rows in (1000, 8):  # together in one block: alone
        monkeypatch.setattr(compensate, "ROWS", rows)
        rounded = round_matrix(storage, dict(tensors), known)
        costs.append(cost(storage.product(rounded, storage.derive(rounded)) - A @ B, known))
    assert costs[1] < 0.9 * costs[0]


def test_refitted_scales_lose_no_more():
    H = gram(D_IN, 3)
    W = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(5))
    codes, scales = round_nearest(W, 4, 32)
    refitted = refit_scales(W, codes, scales, H, 32)
    before, after = (((E @ H) * E).sum(1) for E in (codes * spread(s, 32, D_IN) - W for s in (scales, refitted)))
    assert bool((after <= before * 1.0001).all()) and float(after.sum()) < float(before.sum())
    assert torch.equal(refitted, refitted.bfloat16().float()), "scales are kept in bfloat16"


def test_rounding_leaves_what_it_is_given_as_it_was():
    for W in (torch.randn(8, 64), torch.randn(64, 8).T):  # in memory row by row, and column by column
        before = W.clone()
        round_compensated(W, gram(64, 1), 4, 32)
        assert torch.equal(W, before)


def test_inputs_that_never_came_and_weights_that_are_nothing_do_no_harm():
    for W, H in ((torch.randn(8, 64), torch.zeros(64, 64)), (torch.zeros(8, 64), gram(64, 1))):
        codes, scales = round_compensated(W, H, 4, 32)
        assert bool((codes * spread(scales, 32, 64)).isfinite().all())


def test_turned_factors_have_the_same_product_and_their_least_component_is_what_it_costs():
    A, B, known = problem()
    left, right = turned(A, B, known)
    assert torch.allclose(left @ right, A @ B, atol=1e-4)
    # Without the ridges the least cost of a rank less is half the square of the least singular value of G^1/2 W H^1/2.
    full = Moments(known.inputs + torch.eye(D_IN), known.outputs + torch.eye(D_OUT))
    L, M = torch.linalg.cholesky(full.outputs.double()), torch.linalg.cholesky(full.inputs.double())
    exact = float(torch.linalg.svdvals(L.T @ (A @ B).double() @ M)[RANK - 1].square() / 2)
    assert least_component(A, B, full) == pytest.approx(exact, rel=0.02)


def reading(vocabulary: int = 97, rows: int = 4) -> Reading:
    ids = torch.randint(3, vocabulary, (rows, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in range(0, rows, 2)]
    return Reading(batches, 10_000, choose("cpu", "float32"), Progress())


def wanted_of(model) -> list[Wanted]:
    return [Wanted(f"model.layers.{i}.mlp.{n}_proj", "linear", (48, 32)) for i in (0, 2) for n in ("gate", "up")]


def test_moments_are_the_same_in_one_pass_and_in_many_and_leave_the_model_alone(monkeypatch):
    model = tiny("llama").train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = {one.name: m for one, m in gather(model, wanted_of(model), reading())}
    monkeypatch.setattr(moments, "AT_ONCE", 1)
    again = {one.name: m for one, m in gather(model, wanted_of(model), reading())}
    for name, one in found.items():
        assert torch.equal(one.inputs, again[name].inputs) and torch.equal(one.outputs, again[name].outputs)
        assert float(torch.linalg.eigvalsh(one.inputs).min()) > -1e-6 and float(one.outputs.abs().sum()) > 0
    assert names == [name for name, p in model.named_parameters() if p.requires_grad] and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_moments_of_experts_are_those_of_their_own_tokens():
    model = tiny_mixtral().eval()
    name = "model.layers.0.mlp.experts"
    targets = find_targets(model, [(f"{name}.{p}", "experts") for p in ("gate", "up", "down")], "linears")
    seen = []
    experts = model.get_submodule(name)
    hook = experts.register_forward_pre_hook(lambda m, args, kw: seen.append((args, kw)), with_kwargs=True)
    data = reading(model.config.vocab_size)
    found = {one.name: m for one, m in gather(model, [Wanted(t.name, t.kind, t.shape) for t in targets], data)}
    hook.remove()
    assert experts._through.__func__ is type(experts)._through and experts.config is not None
    chosen = torch.cat([experts.layout.given(experts.num_experts, args, kw)[1].flatten() for args, kw in seen])
    for expert in range(experts.num_experts):
        reached = bool(found[f"{name}.up"].outputs[expert].any())
        assert reached == (expert in chosen), "an expert counts what was routed to it"
        assert float(found[f"{name}.gate"].inputs[expert].trace()) > 0, "one that nothing reached borrows from others"


def factorised(rank: int):
    model = tiny("llama")
    at = {
        f"model.layers.1.mlp.{n}_proj": {"kind": "linear", "storage": "pivoted", "rank": rank} for n in ("up", "down")
    }
    return factorise_(model, at), at


def test_a_weight_takes_the_form_that_loses_least_for_its_bytes():
    model, at = factorised(4)
    done = quantise_(model, find_targets(model, [], "factors"), Quantize(bits=4), reading())
    assert [c.target.name for c in done] == [*at] and all(c.loss >= 0 for c in done)
    kept = {name: module.storage.name for name, module in factor_modules(model)}
    assert kept == {c.target.name: c.storage for c in done}
    # At nearly full rank two factors would take more than all numbers do: they are not even tried.
    model, _ = factorised(28)
    full = quantise_(model, find_targets(model, [], "factors"), Quantize(bits=4), reading())
    assert {c.storage.split(":")[0] for c in full} <= {"pivoted", "dense"}
    model, _ = factorised(4)
    kept_as_is = quantise_(model, find_targets(model, [], "factors"), Quantize(bits=4, storage="keep"), reading())
    assert {c.storage for c in kept_as_is} == {"pivoted:4:32"}


def test_an_odd_number_of_columns_stays_in_full_in_four_bits():
    model, _ = factorised(5)
    done = quantise_(model, find_targets(model, [], "factors"), Quantize(bits=4, storage="keep"), None)
    assert [c.storage for c in done] == [None, None]
    assert {module.storage.name for _, module in factor_modules(model)} == {"pivoted"}
    model, _ = factorised(5)
    eight = quantise_(model, find_targets(model, [], "factors"), Quantize(bits=8, storage="keep"), None)
    assert {c.storage for c in eight} == {"pivoted:8:32"}


def test_a_tied_head_has_the_codes_of_its_embedding_wherever_they_go():
    model = tiny("llama")
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits.detach()
    embedding, head = quantise_ends_(model, 8, 32)
    assert head.target.tied == embedding.target.name == "model.embed_tokens"
    after = model(ids).logits.detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.02
    assert not [name for name in model.state_dict() if name.startswith("lm_head") and "codes" in name]
    held = model.double()
    assert held.lm_head.W_scale is held.model.embed_tokens.W_scale
    assert torch.allclose(held(ids).logits.float(), after, atol=1e-4)


def test_few_bits_take_few_bytes():
    model = tiny("llama")
    full = sum(t.numel() * 2 for t in model.state_dict().values())
    section = Quantize(bits=4, what="all", method="nearest")
    offered = [(f"model.layers.{i}.mlp.{n}_proj", "linear") for i in range(3) for n in ("gate", "up", "down")]
    quantise_model(model, section, offered=offered, device=choose("cpu", "float32"), progress=Progress())
    mlps = [m for name, m in factor_modules(model) if "mlp" in name]
    held = sum(
        t.numel() * (1 if t.dtype in (torch.uint8, torch.int8) else 2) for m in mlps for t in m.state_dict().values()
    )
    numbers = sum(m.in_features * m.out_features for m in mlps)
    assert len(mlps) == 9 and held == sum(m.storage.bytes(m.out_features, m.in_features, m.rank, 2) for m in mlps)
    assert held / numbers <= 0.5 + 2 / 24 and held < full  # groups of 32 and, of 48 columns, of 32 and 16


def test_nothing_to_do_is_said():
    model = tiny("llama")
    with pytest.raises(LillamaError, match="no weight is left"):
        quantise_model(model, Quantize(bits=4, what="factors"), device=choose("cpu", "float32"), progress=Progress())


def test_a_scale_that_no_input_tells_of_stays_what_it_is():
    """Where H is all but 0 for a group, what it would say of the scale is rounding's, and once was 1e30."""
    torch.manual_seed(0)
    W = torch.randn(8, 64)
    codes, scales = round_nearest(W, 8, 32)
    H = torch.zeros(64, 64)
    x = torch.randn(4, 32)
    H[32:, 32:] = x.T @ x
    H[:32, :32] = -1e-12 * torch.eye(32)
    found = refit_scales(W, codes, scales, H, 32)
    assert torch.equal(found[:, 0], scales[:, 0]) and (found / scales - 1).abs().max() <= 0.5
