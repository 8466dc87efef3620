"""Weights that no prediction depends on, as far as gradients show: they stay dense, and the run says so."""

from __future__ import annotations

import json

import any_plugin
import pytest
import torch
from conftest import tiny
from test_sensitivity import recipe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import lillama
from lillama.recipe.schema import Recipe
from lillama.run import pipeline

NEVER, BLIND = "mlp.never", "mlp.picks"


class Picking(LlamaMLP):
    """One linear chooses which units the others read; another is never called."""

    def __init__(self, config):
        super().__init__(config)
        self.picks = nn.Linear(config.hidden_size, config.hidden_size)
        self.never = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        chosen = self.picks(x).topk(16, dim=-1).indices
        return super().forward(torch.zeros_like(x).scatter(-1, chosen, x.gather(-1, chosen)))


@pytest.fixture
def picking(monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", Picking)
    any_plugin.serve(monkeypatch)
    return tiny()


@pytest.mark.parametrize(
    ("strategy", "init"), [("fisher", "fisher"), ("uniform", "fisher"), ("uniform", "whitened"), ("fisher", "svd")]
)
@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_what_nothing_is_known_of_stays_dense(picking, tmp_path, strategy, init, schedule, caplog):
    wanted = recipe(tmp_path, picking, strategy=strategy, init=init, reduction=0.2).model_dump()
    wanted["distill"]["schedule"] = schedule
    result = pipeline.compress(Recipe.parse(wanted))
    unknown = [NEVER] if init == "whitened" else [NEVER, BLIND]
    ranks = result.plan.ranks
    assert ranks and not any(name.endswith(end) for name in ranks for end in unknown)
    assert any(name.endswith("mlp.up_proj") for name in ranks)
    model = lillama.load(result.path)
    assert sum(p.numel() for p in model.parameters()) == result.plan.after
    for _ in range(2):  # the plan says why they have no rank, and still does when the run is asked for again
        rows = json.loads((tmp_path / "out" / "plan.json").read_text())["weights"]
        kept = {row["weight"] for row in rows if "nothing is known" in row.get("kept_dense", "")}
        assert {name.partition("layers.0.")[2] for name in kept if "layers.0." in name} == set(unknown)
        pipeline.compress(Recipe.parse(wanted))
    if "fisher" in (strategy, init):
        assert f"model.layers.0.{NEVER} stays dense: the model's forward pass never calls" in caplog.text
        assert f"model.layers.0.{BLIND} stays dense: no gradient of the predictions reaches it" in caplog.text


DEEPSEEK = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "max_position_embeddings": 64,
}


def test_the_indexer_of_deepseek_v32_stays_dense(tmp_path, monkeypatch):
    any_plugin.serve(monkeypatch)
    config = AutoConfig.for_model("deepseek_v32", **DEEPSEEK)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    result = pipeline.compress(recipe(tmp_path, model, reduction=0.1))
    assert result.plan.ranks and not any("indexer.wq_b" in name for name in result.plan.ranks)
    assert any("experts.gate" in w.name for layer in result.plan.layers for w in layer.weights)
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after
