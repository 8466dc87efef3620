"""Fused experts of every layout: low rank computes what the dense module does, or the layout is refused by name."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import any_plugin
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lillama
from lillama import Layer, LillamaError
from lillama.dense.experts import experts_layout, layout_of, why_not
from lillama.dense.probe import own_forward
from lillama.factorise.initialisers import svd
from lillama.factorise.kfac import Sums, _Experts
from lillama.lowrank import swap
from lillama.lowrank.experts import LowRankExperts, is_fused
from lillama.testing import check_architecture

E, H, INNER, K = 4, 32, 48, 2
SIZES = {
    "hidden_size": H,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_local_experts": E,
    "num_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "moe_latent_size": None,
    "moe_hidden_size": H,
    "expert_ffn_hidden_size": INNER,
    "swiglu_limit": 0.3,
}
KINDS = {
    "GptOss": "gpt_oss.GptOssExperts",  # transposed, in turn, biased, a gate of its own
    "OpenAIPrivacyFilter": "openai_privacy_filter.OpenAIPrivacyFilterExperts",  # transposed, halves, biased
    "Aria": "aria.AriaExperts",  # transposed
    "Llama4": "llama4.Llama4TextExperts",  # transposed, rows sorted by expert
    "NemotronH": "nemotron_h.NemotronHExperts",  # no gate
    "MiniMaxM3VL": "minimax_m3_vl.MiniMaxM3VLExperts",  # a clamped gate
    "HYV4": "hy_v4.HYV4Experts",  # a gate, and no act_fn
    "Inkling2": "inkling2.Inkling2Experts",  # an activation of gate and up
    "Beam": "beam.BeamExperts",
    "MuseSpark": "muse_spark.MuseSparkExperts",  # a norm behind every expert
    "Step3p7": "step3p7.Step3p7Experts",  # one way to run alone
}
CONFIGS = {
    "OpenAIPrivacyFilter": "OpenAIPrivacyFilterConfig",
    "Aria": "AriaTextConfig",
    "Llama4": "Llama4TextConfig",
    "MiniMaxM3VL": "MiniMaxM3VLTextConfig",
    "Inkling2": "Inkling2TextConfig",
    "MuseSpark": "MuseSparkTextConfig",
    "Step3p7": "Step3p7TextConfig",
    "LongcatFlash": "LongcatFlashConfig",
    "Inkling": "InklingTextConfig",
}


def build(kind: str, where: str):
    package, _, name = where.partition(".")
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    module = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    config = getattr(module, CONFIGS.get(kind, f"{kind}Config"))()
    for key, value in SIZES.items():
        setattr(config, key, value)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    dense = getattr(modeling, name)(config)
    for key, parameter in dense.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in key else 0.0, std=0.2)
    return dense.double().requires_grad_(False)


@pytest.fixture(params=KINDS)
def dense(request):
    return build(request.param, KINDS[request.param])


def call(layout, tokens=40):
    generator = torch.Generator().manual_seed(1)
    if layout.sorted:
        x = torch.randn(E, tokens // E, H, generator=generator, dtype=torch.float64)
        x[:, ::3] = 0  # tokens that chose another expert
        return (x.view(-1, H),)
    x = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
    index = torch.rand(tokens, E, generator=generator).topk(K)[1]
    return x, index, torch.rand(tokens, K, generator=generator, dtype=torch.float64)


def low_rank(dense, rank, storage):
    root = nn.ModuleDict({"experts": dense})
    for name in layout_of(dense).projections:
        W = layout_of(dense).weight(dense, name)
        n = min(rank, *W.shape[1:])
        swap.replace(root, f"experts.{name}", kind="experts", storage=storage, rank=n)
        found = [svd(one, n) for one in W]
        swap.set_factors(root, f"experts.{name}", "experts", *(torch.stack(one) for one in zip(*found)))
    return root["experts"]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_full_rank_computes_what_the_dense_module_computes(dense, storage, implementation):
    inputs = call(layout_of(dense))
    expected = own_forward(dense)(dense, *inputs)
    module = low_rank(dense, H, storage)
    module.config = SimpleNamespace(_experts_implementation=implementation)
    found = module(**dict(zip(layout_of(dense).arguments, inputs)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    back = module.to_dense()
    assert type(back) is type(dense) and set(back.state_dict()) == set(dense.state_dict())
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(own_forward(dense)(back, *inputs), expected, rtol=1e-4, atol=1e-5)


def test_low_rank_keeps_biases_and_parts_under_names_that_meet_no_conversion(dense):
    names = set(low_rank(dense, 8, "factors").state_dict())
    layout = layout_of(dense)
    expected = {f"{p}_{letter}" for p in layout.projections for letter in "AB"}
    expected |= {f"{p}_bias" for p in layout.projections} if layout.biased else set()
    assert names == expected | {n for n in dense.state_dict() if "." in n}
    assert not any("gate_up_proj" in n or "down_proj" in n for n in names)


def test_fisher_factors_are_of_every_gradient_inside(dense):
    """Against autograd through the module's own forward: sum of g g^T at every projection's output."""
    layout, inputs = layout_of(dense), call(layout_of(dense), 400)
    hidden, index, weights = layout.given(E, inputs, {})
    weighed = torch.randn(len(hidden), H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # d loss / d W of an expert is sum of g x^T: what the listener saw must give the same.
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    (own_forward(dense)(dense, *inputs) * weighed).sum().backward()
    grads = layout_of(dense)
    fake = type(dense).__new__(type(dense))
    nn.Module.__init__(fake)
    for name, parameter in dense.named_parameters(recurse=False):
        fake.register_parameter(name, nn.Parameter(parameter.grad))
    for name in layout.projections:
        for expert in range(E):
            expected = grads.weight(fake, name)[expert]
            found = seen(dense, layout, name, expert, hidden, index, weights, weighed)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def seen(dense, layout, name, expert, hidden, index, weights, weighed):
    """Sum of g x^T by what `_Experts` hands to `Sums.add`."""
    kept = {}

    class Kept(Sums):
        def add(self, x, g):
            kept["sum"] = g.T @ x

    listener = _Experts(dense, {name: [Kept(one) for one in layout.weight(dense, name)]})
    token, choice = torch.where(index == expert)
    listener._expert(expert, hidden[token], weighed[token] * weights[token, choice, None])
    return kept["sum"]


def test_inputs_counted_without_gradients_are_those_that_gradients_are_of(dense):
    layout, came = layout_of(dense), {"add": [], "count_inputs": []}
    hidden, index, weights = layout.given(E, call(layout, 400), {})

    class Kept(Sums):
        def add(self, x, g):
            came["add"].append(x)

        def count_inputs(self, x):
            came["count_inputs"].append(x)

    listener = _Experts(dense, {name: [Kept(one) for one in layout.weight(dense, name)] for name in layout.projections})
    listener.add(hidden, index, weights, torch.ones_like(hidden))
    listener.count_inputs(hidden, index)
    assert len(came["add"]) == len(came["count_inputs"]) == E * len(layout.projections)
    for one, same in zip(came["add"], came["count_inputs"]):
        assert torch.equal(one, same)


@pytest.mark.parametrize(
    ("kind", "where", "reason"),
    [
        ("LongcatFlash", "longcat_flash.LongcatFlashExperts", "experts"),
        ("Inkling", "inkling.InklingSharedExperts", "gate_proj"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(kind, where, reason, caplog):
    module = build(kind, where)
    assert experts_layout(module) is None and not is_fused(module)
    assert reason in (why_not(module) or "")
    with caplog.at_level(logging.WARNING):
        assert Layer.of_experts(nn.ModuleDict({"mlp": module}), "mlp") == ()
    assert type(module).__name__ in caplog.text and "mlp stays dense" in caplog.text
    with pytest.raises(LillamaError, match=type(module).__name__):
        LowRankExperts(module)


def test_experts_that_compute_something_else_are_refused():
    dense = build("Aria", KINDS["Aria"])

    class Doubled(type(dense)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * own_forward(dense)(self, hidden_states, top_k_index, top_k_weights)

    dense.__class__ = Doubled
    assert "something else" in (why_not(dense) or "")


def test_weights_are_listed_in_the_order_they_run():
    model = nn.ModuleDict({"mlp": build("NemotronH", KINDS["NemotronH"])})
    found = [(w.name, w.shape, w.copies, w.kind, w.group) for w in Layer.of_experts(model, "mlp")]
    assert found == [
        ("mlp.up", (INNER, H), E, "experts", "mlp.in"),
        ("mlp.down", (H, INNER), E, "experts", "mlp.down"),
    ]
    assert Layer.of_experts(nn.ModuleDict({"mlp": nn.Linear(2, 2)}), "mlp") == ()


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
@pytest.mark.slow
def test_a_run_through_and_through(family, tmp_path, monkeypatch):
    any_plugin.serve(monkeypatch)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY)).float()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)
    check_architecture(model, tmp_path, storages=("pivoted",))
    result = next(tmp_path.glob("run-*/model"))
    dense = lillama.load(result)
    ids = torch.tensor([[5, 6, 7]])
    expected = dense(ids).logits
    assert any(isinstance(m, LowRankExperts) for m in dense.modules())
    dense.dequantize()
    assert not any(isinstance(m, LowRankExperts) for m in dense.modules())
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-4)
