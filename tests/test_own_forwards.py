"""Linears and embeddings whose class does more than nn.Linear's: kept as they are, or left out by name."""

from __future__ import annotations

import logging

import any_plugin
import pytest
import torch
from conftest import tiny
from test_sensitivity import kept, kronecker, recipe, run_back
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.inkling.modeling_inkling import InklingNormedEmbedding
from transformers.pytorch_utils import Conv1D

import lillama
from lillama import Layer, LillamaError, Weight
from lillama.checkpoint.export import export_dense
from lillama.dense.plain import is_embedding, is_linear
from lillama.distill.embedding import VocabularyLoss
from lillama.lowrank import swap
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.storage import get_storage
from lillama.run import pipeline
from lillama.testing import check_architecture, token_batches

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def gemma(**more):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **{**SMALL, **more})
    return AutoModelForCausalLM.from_config(config).float().eval()


class Trebled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Shifted(nn.Embedding):
    """Uses its matrix for more than the look-up."""

    def forward(self, ids):
        return super().forward(ids) + self.weight.mean(0)


class Learned(nn.Embedding):
    """With a parameter, a buffer and a module of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shift = nn.Parameter(torch.randn(self.embedding_dim))
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
        self.norm = nn.LayerNorm(self.embedding_dim)
        self.token = 3

    def forward(self, ids):
        out = self.norm(super().forward(ids) * self.scale.to(self.weight.dtype))
        out[ids == self.token] = self.shift
        return out


def test_a_subclass_that_computes_something_else_is_never_in_the_plan(caplog):
    model = nn.ModuleDict({"l": nn.ModuleDict({"a": nn.Linear(8, 8), "b": Trebled(8, 8), "c": FalconLinear(8, 8)})})
    with caplog.at_level(logging.WARNING):
        layer = Layer.of_linears(model, "l", [("a", "b"), ("c",)])
    assert [w.name for w in layer.weights] == ["l.a", "l.c"]
    assert "l.b stays dense" in caplog.text and "Trebled" in caplog.text
    # A plugin that lists it by hand is told so, before anything runs.
    with pytest.raises(LillamaError, match="Trebled whose forward is its own"):
        swap.replace(model, "l.b", kind="linear", storage="factors", rank=2)
    with pytest.raises(LillamaError, match="Trebled whose forward is its own"):
        swap.dense(model, "l.b", "linear")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (Weight("model.layers.0.mlp.up_proj", (48, 32)), "Trebled whose forward is its own"),
        (Weight("model.layers.0.mlp.down_proj", (48, 32)), r"\(48, 32\) here, the model one of \(32, 48\)"),
        (Weight("model.layers.0.mlp.gate", (48, 32)), "no such module"),
        (Weight("model.layers.0.mlp.up", (48, 32), 4, "experts"), "LlamaMLP holds no experts"),
        (Weight("model.layers.0.mlp.gate_proj", (48, 32), kind="embedding"), "has embedding here"),
    ],
)
def test_weights_that_a_plugin_lists_by_hand_are_looked_at_when_planned(weight, said):
    model = tiny()
    model.model.layers[0].mlp.up_proj = Trebled(32, 48)
    with pytest.raises(LillamaError, match=said) as caught:
        swap.check_served(model.to("meta"), [weight])
    assert caught.value.where == weight.name
    swap.check_served(model, any_plugin.block(model, "model.layers.0").weights)


@pytest.mark.parametrize(
    ("module", "served"),
    [
        (FalconLinear(8, 6), True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6), True),
        (DeepseekV4GroupedLinear(8, 6, 2), False),
        (Trebled(8, 6), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), False),
        (Conv1D(6, 8), True),
        (nn.Conv1d(8, 6, 1), False),
    ],
)
def test_linears_are_served_by_what_they_compute(module, served):
    assert is_linear(module) == served
    with torch.device("meta"):  # as a model is planned
        assert is_linear(module.to("meta")) == served


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(
    "dense",
    [
        Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=5.0),
        Learned(20, 8),
        InklingNormedEmbedding(20, 8, 0, 1e-6),
        nn.Embedding(20, 8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_an_embedding_goes_on_doing_what_its_class_does(dense, storage):
    dense.requires_grad_(False)
    ids = torch.tensor([[1, 3, 19]])
    low = LowRankEmbedding.like(dense, get_storage("factors"), 8)
    low.set_factors(dense.weight, torch.eye(8))
    low = low.in_storage(get_storage(storage))
    torch.testing.assert_close(low(ids), dense(ids), rtol=0, atol=1e-5)
    rows = torch.randn(1, 3, 8)
    other = nn.Embedding.from_pretrained(rows[0].repeat_interleave(7, 0))
    dense.weight, expected = nn.Parameter(other.weight[:20], requires_grad=False), dense.weight
    torch.testing.assert_close(low.around(ids, dense.weight[ids]), dense(ids), rtol=0, atol=1e-6)
    dense.weight = expected
    back = low.to_dense()
    assert type(back) is type(dense) and set(back.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(back(ids), dense(ids), rtol=0, atol=1e-5)
    more = 64 if storage == "factors" else 0
    assert sum(p.numel() for p in low.parameters()) == sum(p.numel() for p in dense.parameters()) + more


def test_tokens_of_the_whole_vocabulary_are_compared_as_the_module_puts_them_out():
    dense = Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=5.0).requires_grad_(False)
    low = LowRankEmbedding.like(dense, get_storage("factors"), 8)
    low.set_factors(dense.weight, torch.eye(8))
    watched = VocabularyLoss(dense.weight, low, floor=0.5)
    gap = watched.add_to(torch.tensor(0.0), low, lambda y, x: (y - x).abs().sum(-1), tokens=100, seed=0)
    assert float(gap) < 1e-5
    low.set_factors(dense.weight * 1.1, torch.eye(8))
    gap = watched.add_to(torch.tensor(0.0), low, lambda y, x: (y - x).abs().sum(-1), tokens=4000, seed=0)
    assert float(gap) * 3 == pytest.approx(float(0.1 * 5 * dense.weight.abs().sum(-1).mean()), rel=0.1)


def test_an_embedding_that_cannot_be_kept_is_refused_at_planning():
    assert not is_embedding(Shifted(20, 8)) and not is_embedding(nn.Embedding(20, 8, max_norm=1.0))
    model = gemma()
    model.model.embed_tokens = Shifted(97, 32)
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Shifted"):
        Layer.of_embedding(model)
    model.lm_head = Trebled(32, 97)
    with pytest.raises(ValueError, match=r"lm_head is a Trebled"):
        Layer.of_head(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.slow
def test_a_scaled_embedding_and_its_head_through_a_run(tmp_path, monkeypatch, tied):
    any_plugin.serve(monkeypatch, ends=True)
    model = gemma(tie_word_embeddings=tied)
    check_architecture(model, tmp_path, storages=("pivoted",))
    loaded = lillama.load(next(tmp_path.glob("run-*/model")))
    low = loaded.get_input_embeddings()
    assert isinstance(low, LowRankEmbedding) and isinstance(low, Gemma3TextScaledWordEmbedding)
    assert float(low.embed_scale) == pytest.approx(32**0.5, rel=1e-6)
    assert (loaded.lm_head.B is low.B) == tied
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(low(ids), 32**0.5 * low.weight[ids])
    export_dense(next(tmp_path.glob("run-*/model")), tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.get_input_embeddings()) is Gemma3TextScaledWordEmbedding
    torch.testing.assert_close(dense(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_scaled_embedding_is_measured_at_its_table(tmp_path, monkeypatch, tied):
    """As by the whole model at once in float64: gradients at the vectors before they are scaled."""
    wanted = recipe(tmp_path, gemma(tie_word_embeddings=tied))
    any_plugin.serve(monkeypatch, ends=True)
    found = kept(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 60, (4, 32), generator=generator)} for _ in range(6)]
    pipeline.compress(wanted, batches=batches)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval().requires_grad_(False)
    table, head, scale = model.get_input_embeddings(), model.lm_head, 32**0.5
    vectors, inputs, at_vectors, at_logits = [], [], [], []

    def looked_up(_, args, out):
        vectors.append(F.embedding(args[0], table.weight).flatten(0, -2))
        out.requires_grad_(True).register_hook(lambda gradient: at_vectors.append(scale * gradient.flatten(0, -2)))

    def judged(_, args, out):
        inputs.append(args[0].detach().flatten(0, -2))
        out.register_hook(lambda gradient: at_logits.append(gradient.flatten(0, -2)))

    table.register_forward_hook(looked_up)
    head.register_forward_hook(judged)
    tokens = run_back(model, batches)
    H, G = kronecker(vectors, at_vectors, tokens)
    H = H + 0.1 * table.weight.T @ table.weight / len(table.weight)  # embedding_floor
    if tied:
        top, _ = kronecker(inputs, at_logits, tokens)
        G = G + float(torch.cat(at_logits).square().sum()) / tokens * top
    for name, exact in (("input", H), ("output", G)):
        mine = found[f"model.embed_tokens.{name}"].double()
        assert torch.allclose(mine, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max())), name


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_conv1d_becomes_a_low_rank_linear_and_a_conv1d_again(storage):
    torch.manual_seed(0)
    dense = Conv1D(24, 8)
    nn.init.normal_(dense.bias)
    x = torch.randn(2, 5, 8)
    W = dense.weight.detach().T
    low = LowRankLinear.like(dense, get_storage("factors"), 8)
    low.set_factors(W, torch.eye(8))
    low = low.in_storage(get_storage(storage))
    torch.testing.assert_close(low(x), dense(x), rtol=0, atol=1e-5)
    back = low.to_dense()
    assert type(back) is Conv1D and back.weight.shape == (8, 24) and (back.nf, back.nx) == (24, 8)
    torch.testing.assert_close(back(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gpt2_through_a_run_and_dense_again(tmp_path, monkeypatch):
    any_plugin.serve(monkeypatch)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    layer = any_plugin.layers_of(model)[0]
    assert {w.name.rpartition("h.0.")[2]: w.shape for w in layer.weights} == {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }
    check_architecture(model, tmp_path, storages=("pivoted",))
    result = next(tmp_path.glob("run-*/model"))
    loaded = lillama.load(result)
    assert isinstance(loaded.transformer.h[0].mlp.c_fc, LowRankLinear)
    export_dense(result, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.transformer.h[0].mlp.c_fc) is Conv1D
    inputs = token_batches(model)[0]
    torch.testing.assert_close(dense(**inputs).logits, loaded(**inputs).logits, rtol=1e-4, atol=1e-4)
