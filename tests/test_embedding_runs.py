"""Runs whose embedding and head are in factors: both learn, a stopped run goes on, what is tied stays tied."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from conftest import tiny, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from lillama.base import rundir
from lillama.base.progress import Progress
from lillama.checkpoint import export
from lillama.checkpoint.load import load
from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.evaluate import perplexity
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Recipe
from lillama.run import curve, pipeline, prepare
from lillama.testing import check_architecture, one_and_the_same, recipe_for, token_batches


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-bias", marks=pytest.mark.slow)])  # tied, untied
def test_embedding_and_head_pass_the_contract(name, tmp_path):
    check_architecture(tiny(name), tmp_path, plugin="inkuba")


def run(model, tmp_path, name="run", **changes):
    original = tmp_path / "model"
    if not original.exists():
        model.save_pretrained(original)
    changes = {"compress.reduction": 0.5, "distill.epochs": 4, "distill.learning_rate": 1e-2} | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    prepared = prepare.prepare(recipe_for(original, tmp_path / name, "inkuba", changes))
    batches = token_batches(model, batches=6)
    return pipeline.Run(prepared, Progress(), batches=batches).execute()


def events(path, kind):
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("name", ["llama", "llama-bias"])
def test_both_learn_and_the_run_says_how_well_tokens_are_kept(schedule, name, tmp_path):
    result = run(tiny(name), tmp_path, distill__schedule=schedule, compress__init="random")
    learned = {event["layer"]: event for event in events(tmp_path / "run", "layer")}
    assert set(learned) == {"model.embed_tokens", "lm_head"}
    for event in learned.values():
        assert event["steps"] == 4 * 4
        assert event["loss"] < event["initial_loss"]
    report = result.metrics["embedding"]
    assert report == json.loads((tmp_path / "run" / "embedding.json").read_text())
    assert sum(report["tokens"].values()) == 97
    assert set(report["error"]) == {"frequent", "rare", "unseen", "mean"}
    # Those of the text improve most; the floor's share of the loss keeps the unseen from drifting away.
    assert report["error"]["mean"] < report["initial_error"]["mean"]
    assert report["error"]["unseen"] < 1.1 * report["initial_error"]["unseen"]


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.slow
def test_tied_factors_learn_from_both_uses(schedule, tmp_path):
    """After one step, the factors differ from what either use alone would have made of them."""
    changes = {"distill__schedule": schedule, "distill__epochs": 1, "distill__checks": 1, "distill__holdout": 0}
    model = tiny("llama")
    both = load(run(model, tmp_path, **changes).path)
    assert both.lm_head.A is both.model.embed_tokens.A
    alone = load(run(model, tmp_path, "none", **(changes | {"distill__epochs": 0})).path)
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    other = tmp_path / "untied"
    other.mkdir()
    separate = load(run(untied, other, **changes).path)
    for factor in ("A", "B"):
        found = getattr(both.model.embed_tokens, factor)
        assert not torch.allclose(found, getattr(alone.model.embed_tokens, factor))
        assert not torch.allclose(found, getattr(separate.model.embed_tokens, factor))


def test_logits_are_not_kept_for_all_batches(tmp_path, monkeypatch):
    kept = []
    whole = Walk.run_through

    def watched(walk, module, position, *args):
        kept.append(walk.layers[position].name)
        return whole(walk, module, position, *args)

    monkeypatch.setattr(Walk, "run_through", watched)
    run(tiny("llama-bias"), tmp_path)
    assert "model.norm" in kept and "lm_head" not in kept


@pytest.mark.parametrize("when", ["as it was", "as earlier versions left it"])
def test_a_kill_between_an_embedding_and_its_tied_head_loses_neither(when, tmp_path, monkeypatch):
    """The head's factors are the embedding's: alone, it would be trained from numbers that nobody set."""
    whole = run(tiny("llama"), tmp_path, "whole").path
    write, written = rundir.write_tensors, []

    def killed(path, *args):
        written.append(path.name)
        if len(written) == 2:  # the embedding's file is there, the head's is not
            raise KeyboardInterrupt
        write(path, *args)

    monkeypatch.setattr(rundir, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), tmp_path, "stopped")
    monkeypatch.setattr(rundir, "write_tensors", write)
    if when == "as earlier versions left it":  # the first file was in the manifest already
        manifest = tmp_path / "stopped" / "MANIFEST.json"
        said, name = json.loads(manifest.read_text()), f"layers/{written[0]}"
        said["files"][name] = hashlib.sha256((tmp_path / "stopped" / name).read_bytes()).hexdigest()
        del said["check"]  # which they did not have
        manifest.write_text(json.dumps(said))
    resumed = run(tiny("llama"), tmp_path, "stopped").path
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.slow
def test_a_tied_run_continues_where_it_was_stopped(schedule, tmp_path, monkeypatch):
    from lillama.distill import student

    whole = run(tiny("llama"), tmp_path, "whole", distill__schedule=schedule).path
    steps, step = [], student.Student.step

    def stopped(self, *args):
        steps.append(self.layer.name)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return step(self, *args)

    from lillama.distill import snapshot

    monkeypatch.setattr(student.Student, "step", stopped)
    monkeypatch.setattr(snapshot.Snapshot, "maybe", lambda self, step: self.save(step))
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), tmp_path, "again", distill__schedule=schedule)
    monkeypatch.setattr(student.Student, "step", step)
    again = run(tiny("llama"), tmp_path, "again", distill__schedule=schedule).path
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama", "llama-bias"])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_dense_again_has_the_same_logits_and_ties(name, storage, tmp_path):
    result = run(tiny(name), tmp_path, compress__storage=storage, distill__epochs=0)
    export.export_dense(result.path, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    small = load(result.path).eval()
    ids = token_batches(small)[0]["input_ids"]
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, small(ids).logits, atol=1e-5)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is (name == "llama")
    assert bool(one_and_the_same(small)) is (name == "llama")


def test_without_us_transformers_refuses_the_checkpoint(tmp_path):
    path = run(tiny("llama"), tmp_path, distill__epochs=0).path
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_head_must_come_last(tmp_path):
    model = tiny("llama-bias")
    model.save_pretrained(tmp_path / "model")
    source = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run", "inkuba")).source
    layers = [Layer.of_head(source.model), Layer.of_embedding(source.model)]
    with pytest.raises(LillamaError, match="last layer"):
        prepare._check_layers(layers, source)


def test_finetuning_keeps_tied_factors_tied(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and ran\n" * 60)
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = recipe_for(tmp_path / "model", tmp_path / "run", "inkuba").model_dump(mode="json")
    settings["compress"] |= {"reduction": 0.5, "storage": "pivoted"}
    settings["calibration"] |= {"dataset": str(text), "sequence_length": 8}
    settings["finetune"] = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "sequence_length": 8, "checks": 2}
    result = pipeline.compress(Recipe.parse(settings))
    compressed, tuned = load(tmp_path / "run" / "model"), load(result.path)
    assert sum(p.numel() for p in tuned.parameters()) == result.plan.after
    assert one_and_the_same(tuned) == one_and_the_same(compressed) != set()
    assert not torch.equal(tuned.lm_head.C, compressed.lm_head.C)
    assert torch.equal(tuned.lm_head.weight, tuned.model.embed_tokens.weight)


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("name", ["llama", "llama-bias"])
def test_the_curve_ends_at_the_perplexity_of_the_result(name, schedule, tmp_path):
    result = run(tiny(name), tmp_path, distill__schedule=schedule, distill__checks=1, run__curve=2)
    points = events(tmp_path / "run", "curve")
    assert points and all(point["perplexity"] > 1 for point in points)
    windows = curve.text(
        Recipe.load(tmp_path / "run" / "recipe.resolved.yaml"), None, token_batches(tiny(name), batches=6)
    )
    found = perplexity.score(load(result.path), windows, 4, "cpu")["perplexity"]
    if schedule == "sequential":  # the other's last point is of the last state, the result of the best
        assert points[-1]["perplexity"] == pytest.approx(found, rel=1e-4)


@pytest.mark.slow
def test_little_memory_changes_nothing_in_the_result_where_two_layers_have_one_set_of_factors(tmp_path):
    changes = {"distill__schedule": "concurrent", "distill__epochs": 1}
    plain = run(tiny(), tmp_path, "plain", **changes).path
    low = run(tiny(), tmp_path, "low", run__low_memory=True, **changes).path
    assert (plain / "model.safetensors").read_bytes() == (low / "model.safetensors").read_bytes()
