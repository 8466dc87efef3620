"""Runs with compress.neurons, the checkpoint that is left, and the models in which MLPs are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, OPTConfig

import lillama
from lillama import LillamaError
from lillama.checkpoint.export import export_dense
from lillama.cli.pluginfile import plugin_file
from lillama.cli.trace import summary
from lillama.contract import Neurons
from lillama.lowrank.counts import stored
from lillama.lowrank.narrow import narrow, widened
from lillama.pretrained.neurons import candidates, largest_change
from lillama.pretrained.trace import trace
from lillama.recipe.schema import Recipe
from lillama.run import prepare
from lillama.testing import token_batches

CHANGES: dict[str, Any] = {"neurons": 0.5, "reduction": 0.4, "rank_multiple": 2, "fisher_tokens": 200}


def recipe(model: Path, out: Path, **changes: Any) -> Recipe:
    distill = {"schedule": "sequential", "batch_size": 2, **changes.pop("distill", {})}
    return Recipe.parse(
        {
            "model": {"id": str(model), "dtype": "float32"},
            "compress": {**CHANGES, **changes},
            "distill": distill,
            "calibration": {"dataset": "given"},
            "run": {"out": str(out), "device": "cpu", "compute": "float32"},
        }
    )


@pytest.fixture
def model(tmp_path: Path) -> Any:
    found = tiny("llama-bias")
    found.save_pretrained(tmp_path / "model")
    return found


def batches() -> list[dict[str, Tensor]]:
    return token_batches(tiny("llama-bias"), length=20)


def run(recipe: Recipe) -> Any:
    return lillama.compress(recipe, batches=batches())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batches()[0]["input_ids"]).logits


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_removes_neurons_and_its_checkpoint_is_as_small_as_planned(model, tmp_path, schedule, epochs):
    result = run(recipe(tmp_path / "model", tmp_path / "run", distill={"schedule": schedule, "epochs": epochs}))
    plan = result.plan
    gone = plan.weights["model.layers.0.mlp.down_proj"]
    assert gone.whole == (32, 48) and gone.shape[1] < 48
    loaded = lillama.load(result.path)
    assert sum(p.numel() for p in loaded.parameters()) == plan.after < 0.6 * plan.before
    up = loaded.model.layers[0].mlp.up_proj
    assert (up.out_features, up.in_features) == (gone.shape[1], 32) and up.bias.shape == (gone.shape[1],)
    said = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert said["version"] == 3 and said["shapes"]["model.layers.0.mlp.down_proj"] == [32, gone.shape[1]]
    row = next(r for r in plan.to_dict()["weights"] if r["weight"] == "model.layers.0.mlp.down_proj")
    assert row["shape"] == [32, 48] and row["left"] == [32, gone.shape[1]] and row["parameters"] == 32 * 48
    rank = plan.ranks.get(gone.name)
    assert row["after"] == (gone.parameters if rank is None else stored(gone, rank, plan.storage))
    assert "neurons" in plan.summary()


@pytest.mark.parametrize("updates", [0, 2])
def test_neurons_alone_go_where_no_factors_save_enough(model, tmp_path, updates):
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran\n" * 20)
    changes = {"reduction": 0.15, "keep_dense_below": 0.99, "distill": {"epochs": 0}}
    made = recipe(tmp_path / "model", tmp_path / "run", **changes)
    finetune = {"dataset": str(tmp_path / "text.txt"), "steps": updates, "sequence_length": 8, "teacher": 1.0}
    result = run(Recipe.parse({**made.model_dump(exclude_unset=True), "finetune": finetune if updates else None}))
    assert result.plan.ranks == {} and result.plan.after <= 0.85 * result.plan.before
    loaded = lillama.load(result.path)
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after
    narrow_ones = [one for one in loaded.modules() if isinstance(one, nn.Linear) and 48 not in one.weight.shape]
    assert len(narrow_ones) > 12  # attention and the head, and what lost neurons
    assert torch.isfinite(logits(loaded)).all()
    # More than half of every MLP is not to be had.
    with pytest.raises(LillamaError, match="reduction"):
        run(recipe(tmp_path / "model", tmp_path / "other", **{**changes, "reduction": 0.4}))


def test_neurons_that_matter_least_go_and_the_others_make_up_for_them(model, tmp_path):
    """Of an MLP half of whose neurons are never read nearly nothing is lost with half of them."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-4
    model.save_pretrained(tmp_path / "half")
    skip = ["*self_attn*"]
    changes = {"reduction": 0.3, "of": "weights", "skip": skip, "distill": {"epochs": 0}}
    found = logits(lillama.load(run(recipe(tmp_path / "half", tmp_path / "one", **changes)).path))
    ranks = {**changes, "neurons": None, "reduction": 0.3}
    other = logits(lillama.load(run(recipe(tmp_path / "half", tmp_path / "two", **ranks)).path))
    expected = logits(model)
    assert (found - expected).norm() < 0.1 * (other - expected).norm()


def test_written_dense_the_neurons_are_zeros_and_the_numbers_the_same(model, tmp_path):
    result = run(recipe(tmp_path / "model", tmp_path / "run"))
    export_dense(result.path, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (48, 32)
    assert torch.allclose(logits(dense), logits(lillama.load(result.path)), atol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_weights(model, tmp_path, monkeypatch):
    whole = run(recipe(tmp_path / "model", tmp_path / "whole"))

    def stop(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    asked = recipe(tmp_path / "model", tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr("lillama.run.pipeline.remove_neurons", stop)  # the plan is settled, nothing is removed yet
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    with monkeypatch.context() as patched:
        patched.setattr("lillama.run.pipeline.checkpoint.write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    for file in (tmp_path / "stopped" / "layers").glob("0001*"):
        file.unlink()  # a layer that was not finished
    found = run(asked)
    assert found.plan == whole.plan
    assert torch.equal(logits(lillama.load(found.path)), logits(lillama.load(whole.path)))
    assert not (tmp_path / "stopped" / "sensitivity").exists()


def test_a_plan_that_was_lost_is_read_off_the_checkpoint(model, tmp_path):
    asked = recipe(tmp_path / "model", tmp_path / "run")
    first = run(asked)
    (tmp_path / "run" / "plan.json").unlink()
    (tmp_path / "run" / "metrics.json").unlink()
    again = run(asked)
    assert again.plan.shapes() == first.plan.shapes() and again.plan.after == first.plan.after


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"reduction": None, "size": 0.8}, "compress.neurons"),
        ({"strategy": "uniform"}, "compress.neurons"),
        ({"init": "whitened"}, "compress.neurons"),
        ({"neurons": 1.0}, "compress.neurons"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(model, tmp_path, changes, where):
    with pytest.raises(LillamaError, match="neurons") as caught:
        prepare.prepare(recipe(tmp_path / "model", tmp_path / "run", **changes))
    assert where in str(caught.value) and not (tmp_path / "run").exists()


def test_a_model_without_such_mlps_is_refused(tmp_path):
    tiny("phi3").save_pretrained(tmp_path / "model")
    with pytest.raises(LillamaError, match="no MLP of this model is known"):
        prepare.prepare(recipe(tmp_path / "model", tmp_path / "run"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([3], "shapes are a list"),
        ({"model.layers.0.mlp.up_proj": [24]}, "two whole numbers"),
        ({"model.layers.0.mlp.up_proj": [480, 32]}, "can be left"),
        ({"model.layers.0.mlp": [24, 32]}, "only an nn.Linear"),
        ({"model.layers.9.mlp.up_proj": [24, 32]}, "no such module"),
    ],
)
def test_shapes_that_anybody_wrote_are_checked(model, tmp_path, shapes, message):
    result = run(recipe(tmp_path / "model", tmp_path / "run"))
    path = result.path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["shapes"] = shapes
    path.write_text(json.dumps(config))
    (result.path / "lillama.manifest.json").unlink()
    with pytest.raises(LillamaError, match=message):
        lillama.load(result.path)


def test_a_plan_with_fewer_neurons_is_no_plan_for_a_model_in_memory(model, tmp_path):
    plan = run(recipe(tmp_path / "model", tmp_path / "run")).plan
    with pytest.raises(LillamaError, match="removes neurons"):
        lillama.factorise_(tiny("llama-bias"), plan)


def test_a_linear_is_narrowed_and_widened_with_zeros():
    root = nn.ModuleDict({"a": nn.Linear(6, 8)})
    old = root["a"]
    weight, bias = old.weight.detach()[:5].clone(), old.bias.detach()[:5].clone()
    new = narrow(root, "a", (5, 6), weight, bias)
    x = torch.randn(3, 6)
    assert root["a"] is new and torch.equal(new(x), nn.functional.linear(x, weight, bias))
    wide = widened(new, (8, 7))
    padded = nn.functional.pad(x, (0, 1), value=9.0)
    assert torch.allclose(wide(padded), nn.functional.pad(new(x), (0, 3)))
    with pytest.raises(LillamaError, match="can be left"):
        narrow(root, "a", (9, 6))


def test_tracing_finds_mlps_and_proves_them():
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    layers = trace(AutoModelForCausalLM.from_config(config))
    found = [mlp for layer in layers for mlp in layer.neurons]
    assert [mlp.exit for mlp in found] == [f"model.decoder.layers.{i}.fc2" for i in range(2)]
    assert found[0].entries == found[0].biases == ("model.decoder.layers.0.fc1",)
    # Values of an attention are as wide as what reads them, and are no neurons.
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj") in candidates(layers[0])


def test_an_mlp_with_a_norm_inside_is_none_whose_neurons_may_go():
    config = BitNetConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    layers = trace(model)
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names in candidates(layers[0]) and not any(layer.neurons for layer in layers)
    wrong = Neurons(tuple(f"model.layers.0.{one}" for one in names[:2]), "model.layers.0.mlp.down_proj")
    with pytest.raises(RuntimeError, match="must match"):  # its norm is of all of them
        largest_change(model.eval(), [wrong], logits)
    for layer in model.model.layers:
        layer.mlp.ffn_sub_norm = nn.LayerNorm(64, elementwise_affine=False)
        layer.mlp.ffn_sub_norm.forward = lambda x: nn.functional.layer_norm(x, x.shape[-1:])
    assert largest_change(model, [wrong], logits) > 100


def test_the_plugin_that_tracing_writes_names_the_mlps(tmp_path):
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = AutoModelForCausalLM.from_config(config)
    layers = trace(model)
    text = plugin_file(model, layers)
    assert 'NEURONS = ("fc1", "fc2")' in text
    scope: dict[str, Any] = {}
    exec(compile(text, "plugin", "exec"), scope)
    assert [layer.neurons for layer in scope["enumerate_layers"](model)] == [layer.neurons for layer in layers]
    assert "neurons: model.decoder.layers.0.fc1 -> model.decoder.layers.0.fc2" in summary(layers)
