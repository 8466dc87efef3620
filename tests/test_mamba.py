"""Mamba and Falcon-Mamba: the contract, the linear scan, the fused training path, mixed types, and the plans."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from lillama_mamba.scan import linear_scan, path_in_use, use_linear_scan
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FalconMambaConfig, MambaConfig

from lillama import Layer
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.lowrank import swap as factors
from lillama.pretrained.calls import Capture
from lillama.recipe.schema import Recipe
from lillama.run import pipeline, prepare
from lillama.testing import check_architecture, recipe_for, token_batches

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mamba": MambaConfig(**SMALL, use_bias=True),
    "falcon_mamba": FalconMambaConfig(**SMALL, tie_word_embeddings=False),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def tiny(family, dtype=torch.float32):
    """A random model whose biases are not zero, so that losing one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias") and "dt_proj" not in name:
                parameter.normal_(std=0.1)
    return model.to(dtype)


def modelling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def ids(length=10, batch=2):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def compressed(model, storage="factors", rank=8):
    """`model` with random factors in place of in_proj and out_proj; how the values came about does not matter."""
    torch.manual_seed(2)
    for i in range(len(model.backbone.layers)):
        for name in ("in_proj", "out_proj"):
            path = f"backbone.layers.{i}.mixer.{name}"
            new = factors.replace(model, path, kind="linear", storage=storage, rank=rank)
            new.set_factors(torch.randn(new.out_features, rank) / 4, torch.randn(rank, new.in_features) / 4)
    return model


def fused(xz, conv_w, conv_b, x_w, dt_w, out_w, out_b, A, B, C, D, delta_bias, delta_softplus, **norms):
    """What mamba-ssm's fused function computes, from its arguments alone."""

    def norm(v):  # of Falcon-Mamba alone; its weights are ones
        return F.rms_norm(v, v.shape[-1:], eps=norms["b_c_dt_rms_eps"]) if "dt_rms_weight" in norms else v

    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(x, conv_w, conv_b, padding=conv_w.shape[-1] - 1, groups=len(conv_w))[..., : x.shape[-1]])
    dt, B, C = F.linear(x.transpose(1, 2), x_w).split([dt_w.shape[1], A.shape[1], A.shape[1]], -1)
    dt, B, C = norm(dt), norm(B), norm(C)
    dt = F.linear(dt, dt_w).transpose(1, 2)
    y = linear_scan(x, dt, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_w, out_b)


@FAMILIES
def test_the_contract_holds(family, tmp_path):
    model = tiny(family)
    batches = token_batches(model, batches=2, length=6)
    check_architecture(model, tmp_path, batches, plugin="mamba")


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_scan_changes_neither_outputs_nor_gradients(family, dtype):
    stock = tiny(family, dtype)
    linear = copy.deepcopy(stock)
    assert use_linear_scan(linear) == 2
    x, mask = ids(), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    for model in (stock, linear):
        model(input_ids=x, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    with torch.no_grad():
        assert torch.equal(stock(input_ids=x).logits, linear(input_ids=x).logits)
    for (name, a), b in zip(stock.named_parameters(), linear.parameters()):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name


class Elements(TorchDispatchMode):
    """Counts the numbers that all operations write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Views write nothing.
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.total += out.numel()
        return out


def work(model, length):
    loss = model(input_ids=ids(length, 1), use_cache=False).logits.sum()
    with Elements() as elements:
        loss.backward()
    return elements.total


def test_backward_is_linear_in_length():
    stock, linear = tiny("mamba"), tiny("mamba")
    use_linear_scan(linear)
    assert work(linear, 128) < 2.1 * work(linear, 64)
    assert work(stock, 128) > 3 * work(stock, 64), "transformers' own scan became linear: ours has no purpose left"


def test_a_copy_of_a_prepared_layer_runs_its_own_weights():
    model = tiny("mamba")
    use_linear_scan(model)
    layer = model.backbone.layers[0]
    student = copy.deepcopy(layer)
    x = torch.randn(1, 5, 24)
    before = layer(x)
    with torch.no_grad():
        student.mixer.out_proj.weight.zero_()
        student.mixer.out_proj.bias.zero_()
    assert torch.equal(student(x), x)
    assert torch.equal(layer(x), before)


@FAMILIES
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_the_fused_training_path_trains_the_factors(family, storage, monkeypatch):
    model = compressed(tiny(family), storage)
    plain, calls = {}, []
    for mode in ("eval", "train", "fused"):
        if mode == "fused":
            monkeypatch.setattr(modelling(family), "mamba_inner_fn", lambda *a, **k: calls.append(a) or fused(*a, **k))
        model.train(mode != "eval").zero_grad()
        logits = model(input_ids=ids(), use_cache=False).logits
        logits.square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        found["logits"] = logits.detach()
        plain = plain or found
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert len(calls) == 2, "the fused function was not called by every block"
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(calls[0][5], mixer.out_proj.weight)
    assert (calls[0][6] is None) == (mixer.out_proj.bias is None)
    factor_names = [n for n in plain if ".out_proj." in n or ".in_proj." in n]
    # No dense weight is left that a kernel could read instead of the factors.
    assert factor_names and not any(n.endswith("proj.weight") for n in factor_names)
    assert all(plain[n].abs().sum() > 0 for n in factor_names)


def test_cpu_tensors_never_reach_a_kernel(monkeypatch):
    expected = tiny("mamba")(input_ids=ids()).logits

    def kernel(*args, **kwargs):
        raise RuntimeError("expected x.is_cuda() to be true")

    monkeypatch.setattr(modelling("mamba"), "mamba_selective_scan", kernel)
    model = tiny("mamba")
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(input_ids=ids())
    use_linear_scan(model)
    assert torch.equal(model(input_ids=ids()).logits, expected)


def test_a_mixer_of_another_make_is_left_alone():
    class Mixer(torch.nn.Module):
        def forward(self, x):
            return x

    mixer = Mixer()
    assert use_linear_scan(mixer) == 0
    assert "forward" not in vars(mixer)


def test_a_run_never_uses_the_stock_scan(monkeypatch, tmp_path):
    tiny("mamba").save_pretrained(tmp_path / "model")

    def stock(*args, **kwargs):
        raise RuntimeError("the stock scan was called")

    monkeypatch.setattr(modelling("mamba"), "mamba_selective_scan", stock)
    recipe = recipe_for(tmp_path / "model", tmp_path / "run")
    prepared = prepare.prepare(recipe)
    result = pipeline.Run(prepared, Progress(), batches=token_batches(prepared.source.model)).execute()
    assert result.plan.after < result.plan.before


def test_capturing_keeps_a_forward_that_a_plugin_set():
    model = tiny("mamba")
    layer = model.backbone.layers[0]
    own = layer.forward = lambda hidden_states, **kwargs: hidden_states
    Capture(model, [Layer("backbone.layers.0")], torch.device("cpu"))({"input_ids": ids()})
    assert layer.forward is own


@pytest.mark.parametrize(("schedule", "residual"), [("concurrent", True), ("sequential", False)])
def test_bfloat16_runs_learn_what_float32_runs_do(schedule, residual, tmp_path):
    model = tiny("mamba", torch.bfloat16)
    model.config.residual_in_fp32 = residual
    model.save_pretrained(tmp_path / "model")
    batches, logits = token_batches(model, batches=6), {}
    for name in ("bfloat16", "float32"):
        changes = {"model.dtype": name, "run.compute": name, "distill.schedule": schedule, "compress.reduction": 0.4}
        recipe = recipe_for(tmp_path / "model", tmp_path / name, changes=changes)
        prepared = prepare.prepare(recipe)
        block = prepared.source.model.backbone.layers[0]
        assert block.mixer.in_proj.weight.dtype == getattr(torch, name)
        result = pipeline.Run(prepared, Progress(), batches=batches).execute()
        loaded = load(result.path)
        assert loaded.backbone.layers[0].mixer.in_proj.A.dtype == getattr(torch, name)
        with torch.no_grad():
            logits[name] = loaded.eval()(**batches[0]).logits.float()
    difference = (logits["bfloat16"] - logits["float32"]).norm() / logits["float32"].norm()
    assert difference < 0.05


def test_bfloat16_blocks_return_float32_and_so_do_their_students():
    block = tiny("mamba", torch.bfloat16).backbone.layers[0]
    x = torch.randn(1, 5, 24, dtype=torch.bfloat16)
    y = block(x)
    assert y.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = copy.deepcopy(block).float()(x)
    assert student.dtype == torch.float32
    torch.testing.assert_close(student, y, rtol=0.05, atol=0.05)


@FAMILIES
@pytest.mark.parametrize("prepared", [False, True])
def test_generation_with_the_cache_equals_the_full_forward(family, prepared):
    model = compressed(tiny(family))
    if prepared:
        use_linear_scan(model)
    x = ids()
    with torch.no_grad():
        full = model(input_ids=x, use_cache=False).logits
        out = model(input_ids=x[:, :4], use_cache=True)
        pieces = [out.logits]
        for t in range(4, x.shape[1]):
            out = model(input_ids=x[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)
        options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
        cached = model.generate(x, attention_mask=torch.ones_like(x), use_cache=True, **options)
        for t in range(x.shape[1], cached.shape[1]):
            scores = model(input_ids=cached[:, :t], use_cache=False).logits[:, -1]
            scores[:, 2] = -torch.inf  # no end of sequence before 8 tokens
            assert torch.equal(cached[:, t], scores.argmax(-1))


FULL_SIZE = {
    "mamba2_8b_20": (
        MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50280, state_size=16),
        2.77e9,
        2.22e9,
        256 * (10240 + 2560),
    ),
    "falcon_mamba7b_20": (
        FalconMambaConfig(
            hidden_size=4096, num_hidden_layers=64, vocab_size=65024, state_size=16, tie_word_embeddings=False
        ),
        7.27e9,
        5.82e9,
        256 * (16384 + 4096),
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_recipes_give_the_sizes_of_table_13(name):
    config, before, after, one_rank_step = FULL_SIZE[name]
    plan = prepare.make_plan(Recipe.load(RECIPES / f"{name}.yaml"), config)
    assert plan.before == pytest.approx(before, abs=1e7)  # the last of the table's three digits
    assert plan.after == pytest.approx(after, abs=1e7)
    assert 0 <= 0.8 * plan.before - plan.after <= one_rank_step
    # Algorithm 1 from the bottom: the layers nearest the input go down to rank 1024, the last ones stay dense.
    assert plan.ranks["backbone.layers.0.mixer.in_proj"] == plan.ranks["backbone.layers.0.mixer.out_proj"] == 1024
    assert not any(rank for weight, rank in plan.ranks.items() if weight.startswith("backbone.layers.63."))


def test_doctor_says_why_no_kernel_is_used(monkeypatch, tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    line = path_in_use()
    assert "linear" in line
    assert "mamba_ssm cannot be imported: ImportError: undefined symbol" in line
    assert "causal_conv1d" in line
