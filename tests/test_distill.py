"""The engine: schedules agree, layers are driven as the model drives them, a killed run ends as an unbroken one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

from lillama import host
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.distill import losses, student
from lillama.errors import LillamaError
from lillama.factorise import start
from lillama.factorise.known import WeightStatistics
from lillama.pretrained.calls import Capture
from lillama.pretrained.source import Source
from lillama.pretrained.walk import LayerPass
from lillama.recipe.schema import Recipe
from lillama.run import pipeline, prepare
from lillama.testing import recipe_for, token_batches


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


def run(original, out, batches=None, **changes):
    settings = {"distill.checks": 2, **{k.replace("__", "."): v for k, v in changes.items()}}
    recipe = recipe_for(original, out, changes=settings)
    return pipeline.compress(recipe, batches=batches or token_batches(tiny(), batches=6))


def layers_of(result):
    # Copies: safetensors maps the file into memory, and a test may write over it.
    return {
        p.name: {name: tensor.clone() for name, tensor in load_file(p).items()}
        for p in sorted((result.path.parent / "layers").iterdir())
    }


def assert_same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for file in first:
        for name, value in first[file].items():
            torch.testing.assert_close(second[file][name], value, rtol=tolerance, atol=tolerance, msg=f"{file} {name}")


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_schedules_agree_where_layers_are_independent(original, tmp_path, storage):
    results = [
        run(original, tmp_path / schedule, distill__loss="teacher", distill__schedule=schedule,
            distill__epochs=3, compress__storage=storage)
        for schedule in ("sequential", "concurrent")
    ]  # fmt: skip
    first, second = map(layers_of, results)
    assert len(first) == 3
    if storage == "factors":
        assert_same(first, second, 1e-5)
    else:  # rounding may choose other pivots of the same matrix: compare what they compute
        logits = [load(r.path)(**token_batches(tiny())[0]).logits for r in results]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("loss", ["student", "teacher+student"])
@pytest.mark.slow
def test_less_memory_changes_no_bit(original, tmp_path, loss, schedule):
    same = {"distill__schedule": schedule, "distill__loss": loss, "distill__epochs": 3, "compress__init": "random"}
    usual = run(original, tmp_path / "usual", **same)
    low = run(original, tmp_path / "low", run__low_memory=True, run__snapshot_seconds=0.0, **same)
    assert_same(layers_of(usual), layers_of(low))
    # What it put on disk meanwhile is gone, and the original layers it let go are in the checkpoint.
    assert not list((tmp_path / "low").glob("best.*"))
    assert load(low.path)(**token_batches(tiny())[0]).logits.isfinite().all()


def test_training_lowers_the_held_out_loss_and_the_best_state_is_kept(original, tmp_path):
    result = run(original, tmp_path, distill__epochs=8, distill__checks=8, compress__init="random")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for done in (e for e in events if e["event"] == "layer"):
        checks = [e["held_out_loss"] for e in events if e["event"] == "check" and e["layer"] == done["layer"]]
        assert len(checks) == 8
        assert done["loss"] == min([*checks, done["initial_loss"]])
        assert done["loss"] < done["initial_loss"]
    assert result.plan.after == sum(p.numel() for p in load(result.path).parameters())


def test_driving_layers_gives_the_full_forward_bit_for_bit():
    # Mistral's sliding window and Qwen's none: masks differ by model, and positions matter.
    for name in ("llama", "mistral", "phi", "phi3", "qwen3"):
        model = tiny(name)
        listed = _layers(model)
        batch = token_batches(model)[0]
        captured, hidden = Capture(model, listed, torch.device("cpu"))(batch)
        with torch.no_grad():
            for layer, call in zip(listed, captured.calls):
                hidden = call(model.get_submodule(layer.name), hidden)
            expected = model.model(**batch, output_hidden_states=True, use_cache=False)
        norm = model.model.final_layernorm if name == "phi" else model.model.norm
        assert torch.equal(norm(hidden), expected.last_hidden_state), name
    assert not any("forward" in m.__dict__ for m in model.modules()), "the capture left its hooks behind"


def _layers(model):
    return host.get().layers(model, Recipe.parse(BASE))[1]


BASE = {
    "model": {"id": "x"},
    "compress": {"reduction": 0.1},
    "calibration": {"dataset": "x"},
    "run": {"out": "x"},
}


def test_padding_changes_nothing(original, tmp_path):
    """The same sequences padded to twice their length, with a mask, give the same factors."""
    batches = token_batches(tiny(), batches=4)
    padded = [
        {
            "input_ids": torch.cat([b["input_ids"], torch.zeros(2, 12, dtype=torch.long)], 1),
            "attention_mask": torch.cat([torch.ones(2, 12), torch.zeros(2, 12)], 1).long(),
        }
        for b in batches
    ]
    settings = {"distill__loss": "teacher+student", "distill__epochs": 2}
    first = run(original, tmp_path / "plain", batches, **settings)
    second = run(original, tmp_path / "padded", padded, **settings)
    assert_same(layers_of(first), layers_of(second), 2e-4)


def test_teacher_student_is_the_sum(original, tmp_path):
    recipe = recipe_for(original, tmp_path)
    prepared = prepare.prepare(recipe)
    source, plan = prepared.source, prepared.plan
    source.fetch(tmp_path)
    source.materialise(["model"])
    layer = prepared.layers[0]
    teacher = source.model.get_submodule(layer.name)
    batch, hidden = Capture(source.model, prepared.layers, torch.device("cpu"))(token_batches(tiny())[0])
    at = LayerPass(layer, 0, teacher, [batch], {})
    known = {w.name: WeightStatistics(gram=torch.eye(w.shape[1])) for w in layer.weights}
    init = start.initial_factors(at, plan, start.Initialiser.of(recipe), known)
    inputs = {"teacher": hidden, "student": hidden + 0.1}
    values = {}
    for loss in ("teacher", "student", "teacher+student"):
        changed = recipe_for(original, tmp_path, changes={"distill.loss": loss})
        one = student.Student(at, student.Training(plan, changed.distill, 0.0, prepared.device, 1), init)
        with torch.no_grad():
            values[loss] = float(one.measure(batch, batch.calls[0](teacher, hidden), inputs)[0])
    assert values["teacher+student"] == pytest.approx(values["teacher"] + values["student"], rel=1e-6)
    assert values["teacher"] != pytest.approx(values["student"], rel=1e-3)


def test_bottom_reads_and_runs_nothing_above_its_last_planned_layer(original, tmp_path, monkeypatch):
    read = []
    real = Source.materialise
    monkeypatch.setattr(Source, "materialise", lambda self, names, *a: (read.extend(names), real(self, names, *a))[1])
    changes = {"compress__strategy": "bottom", "compress__min_rank": 8, "compress__rank_step": 2}
    run(original, tmp_path, compress__reduction=0.05, distill__schedule="concurrent", **changes)
    assert "model.layers.0" in read
    assert not any(name.startswith(("model.layers.1", "model.layers.2")) for name in read)


def test_only_the_layer_in_work_is_materialised(original, tmp_path, monkeypatch):
    most = []
    real = Source.materialise

    def watch(self, names, *args):
        real(self, names, *args)
        most.append(sum(not p.is_meta for layer in self.model.model.layers for p in layer.parameters()))

    monkeypatch.setattr(Source, "materialise", watch)
    run(original, tmp_path, distill__schedule="sequential")
    assert max(most) == sum(1 for _ in tiny().model.layers[0].parameters())


def test_the_same_command_again_does_nothing(original, tmp_path):
    first = run(original, tmp_path)
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = run(original, tmp_path)
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.metrics["parameters"] == first.metrics["parameters"]


def test_another_run_in_the_same_directory_is_refused_with_the_difference(original, tmp_path):
    run(original, tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(LillamaError, match=r"recipe\.compress\.reduction: 0\.1 there, 0\.2 here"):
        run(original, tmp_path, compress__reduction=0.2)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_other_weights_under_the_same_name_are_not_mixed_in(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out")
    other = tiny(seed=1)
    other.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 5))
    with pytest.raises(LillamaError, match=r"model\.model\.safetensors"):
        run(tmp_path / "model", tmp_path / "out")


def test_a_damaged_layer_is_made_again(original, tmp_path):
    first = run(original, tmp_path / "a")
    good = layers_of(first)
    for victim in (tmp_path / "a" / "layers").iterdir():
        if "layers.1" in victim.name:
            victim.write_bytes(victim.read_bytes()[:-4] + b"\0\0\0\0")
    (tmp_path / "a" / "model" / "config.json").unlink()
    assert_same(good, layers_of(run(original, tmp_path / "a")))


CHILD = """
import sys, torch
torch.set_num_threads(1)
from lillama.run import pipeline
from lillama.testing import recipe_for, token_batches
sys.path.insert(0, sys.argv[1])
from conftest import tiny
changes = {"distill.schedule": sys.argv[4], "distill.epochs": 60, "distill.checks": 5,
           "distill.loss": "teacher+student", "distill.train": "layer"}
recipe = recipe_for(sys.argv[2], sys.argv[3], changes=changes)
recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"snapshot_seconds": 0.05})})
pipeline.compress(recipe, batches=token_batches(tiny(), batches=6))
"""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_a_killed_run_ends_with_the_same_weights(original, tmp_path, schedule):
    here = str(Path(__file__).parent)

    def start(out):
        return subprocess.Popen([sys.executable, "-c", CHILD, here, str(original), str(out), schedule])

    assert start(tmp_path / "whole").wait() == 0
    kills = 0
    while True:
        process = start(tmp_path / "broken")
        done = tmp_path / "broken" / "events.jsonl"
        size = done.stat().st_size if done.exists() else 0
        # Kill after a few more events each time: in the first layer, and between layers.
        while process.poll() is None and kills < 2:
            if done.exists() and done.stat().st_size > size + 250 * (kills + 1):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert kills == 2
    events = [json.loads(line)["event"] for line in (tmp_path / "broken" / "events.jsonl").read_text().splitlines()]
    assert events.count("start") == 3
    if schedule == "concurrent":
        assert "resumed" in events
    else:  # finished layers are not made again
        assert events.count("layer") == 3
    for name in ("whole", "broken"):
        assert not list((tmp_path / name).rglob("*.part")) or name == "broken"
    first = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    second = load_file(tmp_path / "broken" / "model" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_learning_rate_schedules():
    recipe = recipe_for("x", "y", changes={"distill.warmup": 0.1, "distill.lr_schedule": "cosine"}).distill
    training = student.Training(None, recipe, 0.0, None, 100)
    rates = [training.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(recipe.learning_rate / 11)
    assert max(rates) == rates[10] == recipe.learning_rate
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < recipe.learning_rate * 1e-2
    constant = recipe_for("x", "y").distill
    assert student.Training(None, constant, 0.0, None, 10).learning_rate(7) == constant.learning_rate


def test_a_plugin_s_own_objective_and_initialiser(original, tmp_path, monkeypatch):
    from lillama import registry

    monkeypatch.setitem(registry.OBJECTIVES._targets, "mine", lambda s, t: losses.mse(s, t) * 2)
    monkeypatch.setitem(registry.INITIALISERS._targets, "zeros", _zeros)
    result = run(original, tmp_path, distill__objective="mine", compress__init="zeros", distill__epochs=0)
    tensors = load_file(result.path / "model.safetensors")
    assert float(tensors["model.layers.0.self_attn.q_proj.A"].abs().max()) == 0.0
    assert math.isfinite(float(load(result.path)(**token_batches(tiny())[0]).logits.sum()))


def _zeros(W, rank):
    return torch.zeros(W.shape[0], rank), torch.zeros(rank, W.shape[1])


def test_progress_goes_nowhere_unless_asked(original, tmp_path, capsys):
    run(original, tmp_path)
    assert capsys.readouterr().out == ""
    assert Progress().console is None
