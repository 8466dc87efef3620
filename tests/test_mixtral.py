"""Mixtral: the contract, hub-format files, partly planned layers, and the plan of the real model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from test_checkpoint import PLAIN
from transformers import MixtralConfig, MixtralForCausalLM

from lillama.base.progress import Progress
from lillama.checkpoint import export
from lillama.checkpoint.load import load
from lillama.lowrank.experts import LowRankExperts
from lillama.plan.plan import Plan
from lillama.recipe.schema import Recipe
from lillama.run import pipeline, prepare
from lillama.testing import check_architecture, recipe_for, token_batches

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(2)]


REFUSED = """
import sys
from transformers import AutoModelForCausalLM
assert "lillama" not in sys.modules
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError as error:
        assert "mismatch" in str(error).lower(), error
    else:
        raise AssertionError(f"{path} loaded")
"""


def tiny() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY)).float().eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    tiny().save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batches(tiny())[0]).logits


def run(original, out, ranks, **changes):
    """A run whose plan is exactly `ranks`."""
    settings = {"distill.train": "layer", **{k.replace("__", "."): v for k, v in changes.items()}}
    prepared = prepare.prepare(recipe_for(original, out, changes=settings))
    prepared.plan = Plan(tuple(prepared.layers), ranks, "factors", prepared.source.parameters)
    return pipeline.Run(prepared, Progress(), batches=token_batches(tiny())).execute()


def test_mixtral_passes_the_contract(tmp_path):
    check_architecture(tiny(), tmp_path, plugin="mixtral")


@pytest.mark.parametrize("schedule", ["concurrent", "sequential"])
def test_a_layer_planned_in_part_loads_and_saves_again(original, tmp_path, schedule):
    # As `bottom` leaves its last layer: up and down of the second layer stay dense.
    ranks = {f"{LAYERS[0]}.{p}": 8 for p in ("gate", "up", "down")} | {f"{LAYERS[1]}.gate": 8}
    result = run(original, tmp_path / "run", ranks, distill__schedule=schedule)
    model = load(result.path)
    assert sum(p.numel() for p in model.parameters()) == result.plan.after
    assert model.get_submodule(LAYERS[1]).ranks == {"gate": 8}
    before = tiny().get_submodule(LAYERS[1])
    # The layer was trained as a whole, so its dense projections moved, but not far.
    up = model.get_submodule(LAYERS[1]).weight("up")
    torch.testing.assert_close(up, before.gate_up_proj[:, 48:], rtol=0, atol=0.1)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_the_router_learns_with_its_layer_and_is_stored_under_its_hub_name(original, tmp_path):
    key = "model.layers.0.block_sparse_moe.gate.weight"
    found = {}
    for train in ("factors", "layer"):
        ranks = {f"{LAYERS[0]}.gate": 8}
        result = run(original, tmp_path / train, ranks, distill__train=train, distill__holdout=0.0)
        with safe_open(result.path / "model.safetensors", "pt") as tensors:
            found[train] = tensors.get_tensor(key)
            assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in tensors.keys()  # noqa: SIM118
    router = tiny().model.layers[0].mlp.gate.weight
    assert torch.equal(found["factors"], router)
    assert not torch.equal(found["layer"], router)


@pytest.mark.slow
def test_without_lillama_it_fails_and_dense_it_loads_anywhere(original, tmp_path):
    result = run(original, tmp_path / "run", {f"{LAYERS[0]}.down": 8})
    load(result.path).save_pretrained(tmp_path / "again")
    command = [sys.executable, "-c", REFUSED, str(result.path), str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True)
    from safetensors.torch import load_file, save_file

    export.export_dense(result.path, tmp_path / "dense")
    save_file(token_batches(tiny())[0], tmp_path / "in")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, capture_output=True)
    expected = logits(load(result.path))
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], expected, rtol=0, atol=1e-5)


def test_generation_on_bfloat16_and_grouped_products(original, tmp_path):
    model = load(run(original, tmp_path, {f"{LAYERS[0]}.up": 8}).path, dtype=torch.bfloat16)
    assert isinstance(model.get_submodule(LAYERS[0]), LowRankExperts)
    ids = torch.tensor([[5, 6, 7]])
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert out.shape == (1, 6)


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_experts_in_pivoted_storage(original, tmp_path, schedule):
    changes = {"compress.storage": "pivoted", "distill.schedule": schedule}
    recipe = recipe_for(original, tmp_path, changes=changes)
    result = pipeline.compress(recipe, batches=token_batches(tiny()))
    model = load(result.path)
    assert sum(p.numel() for p in model.parameters()) == result.plan.after
    experts = model.get_submodule(LAYERS[0])
    assert {m.storage.name for m in experts.matrices().values()} == {"pivoted"}
    ids = token_batches(model)[0]
    logits = model(**ids).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(**ids).logits, logits)
    dense = load(result.path)
    dense.dequantize()
    torch.testing.assert_close(dense(**ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral8x7b_20", "mixtral8x7b_20_24gb"])
def test_the_real_model_s_plan_is_table_3(name, request):
    recipe = Recipe.load(request.config.rootpath / f"recipes/{name}.yaml", ["run.device=cpu"])
    plan = prepare.make_plan(recipe, MixtralConfig())
    assert plan.before == 46_702_792_704
    assert 37.0e9 < plan.after <= 37.4e9
    assert len(plan.work) == 10
    assert set(plan.ranks.values()) <= {1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072}
