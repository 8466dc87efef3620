"""Numbers that are not finite: named where they arise, recovered from where that can help, and never stored."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lillama
from lillama import registry
from lillama.base import tensorfile
from lillama.distill import job as jobs
from lillama.distill import snapshot, student
from lillama.errors import LillamaError
from lillama.factorise import initialisers
from lillama.factorise.start import Initialiser
from lillama.lowrank.storage import Factors
from lillama.testing import recipe_for, token_batches

sys.path.append(str(Path(__file__).parents[1] / "golden"))

NAN, INF = float("nan"), float("inf")
SCHEDULES = ("sequential", "concurrent")


def run(model, tmp_path, name="run", plugin="auto", batches=None, **changes):
    original = tmp_path / "model"
    if not original.exists():
        model.save_pretrained(original)
    changes = {"distill.checks": 2, "distill.epochs": 2} | {k.replace("__", "."): v for k, v in changes.items()}
    recipe = recipe_for(original, tmp_path / name, plugin, changes)
    return lillama.compress(recipe, batches=batches or token_batches(tiny(), batches=6))


def events(path, kind):
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def digest(result):
    return hashlib.sha256((result.path / "model.safetensors").read_bytes()).hexdigest()


def check_whole(result):
    """Every stored number is finite, the model loads strictly, has as many parameters as planned, and predicts."""
    for file in result.path.parent.rglob("*.safetensors"):
        with safe_open(file, "pt") as held:
            assert all(held.get_tensor(key).isfinite().all() for key in held.keys()), file  # noqa: SIM118
    model = lillama.load(result.path).eval()
    assert sum(p.numel() for p in model.parameters()) == result.plan.after
    plan = json.loads((result.path.parent / "plan.json").read_text())
    assert plan["parameters"]["after"] == result.plan.after
    with torch.no_grad():
        assert model.float()(**token_batches(tiny())[0]).logits.isfinite().all()
    return model


@pytest.fixture
def register(monkeypatch):
    """Registers a function under a name for one test."""

    def add(of, name, function):
        monkeypatch.setattr(of, "_targets", dict(of._targets))
        of.add(name, function)

    return add


# --- The original ---


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_number_of_the_original_that_is_not_finite_is_named(bad, schedule, tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = bad
    with pytest.raises(LillamaError) as error:
        run(model, tmp_path, distill__schedule=schedule)
    said = str(error.value)
    assert "2 of 1,536 numbers are not finite" in said and "'model.layers.1.mlp.up_proj.weight'" in said
    assert "model.safetensors" in error.value.where and error.value.hint
    assert not list((tmp_path / "run").glob("layers/0001*"))


@pytest.mark.parametrize("family", ["mixtral", "mamba", "whisper", "inkuba"])
def test_so_is_one_of_every_family(family, tmp_path):
    import make

    torch.manual_seed(0)
    model = getattr(make, family)().float().eval()
    name, weight = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and "layers.1" in n][-1]
    weight.data.view(-1)[5] = NAN
    batches = make.heard(model) if family == "whisper" else token_batches(model, length=8)
    stem = name.replace("down_proj", "").replace(".experts.gate_up_proj", "")
    with pytest.raises(LillamaError, match=r"1 of .* numbers is not finite in the original's weight") as error:
        run(model, tmp_path, plugin=family, batches=batches, distill__schedule="sequential")
    assert stem.rpartition(".")[0] in str(error.value)


def test_a_weight_too_large_for_the_type_of_the_checkpoint_is_named(tmp_path):
    model = tiny()
    model.model.layers[0].input_layernorm.weight.data[0] = 1e5
    with pytest.raises(LillamaError, match=r"layers\.0\.input_layernorm\.weight', in float16"):
        run(model, tmp_path, model__dtype="float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("init", ["svd", "whitened", "fisher"])
def test_activations_of_the_original_that_overflow_are_named_by_layer_and_batch(schedule, init, tmp_path):
    model = tiny()
    for name in ("up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data *= 1e25
    place = r": .*not finite in calibration batch \d"
    if (schedule, init) == ("concurrent", "whitened"):  # whose Grams come first, and are finite for no weight after it
        place = r"\.mlp\.down_proj: .*not finite"
    with pytest.raises(LillamaError, match=rf"model\.layers\.1{place}") as error:
        run(model, tmp_path, distill__schedule=schedule, compress__init=init)
    assert "run.compute: float32" in error.value.hint


def test_statistics_that_overflow_are_named_by_weight(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e25  # the layer's output is finite, its square is not
    with pytest.raises(LillamaError, match=r"model\.layers\.1\.mlp\.down_proj: .*activations.*not finite"):
        run(model, tmp_path, distill__schedule="sequential")


# --- Learning ---


@pytest.fixture
def spoil(register):
    """Registers the loss `spoiled`: NaN at the calls with gradients of these numbers."""

    def add(*at):
        calls = []

        def spoiled(on_teacher):
            calls.extend([1] * torch.is_grad_enabled())
            return on_teacher * NAN if torch.is_grad_enabled() and len(calls) in at else on_teacher

        register(registry.LOSSES, "spoiled", spoiled)

    return add


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("holdout", [0.3, 0.0])
@pytest.mark.parametrize("plugin", ["decoder", "inkuba"])  # inkuba: a tied embedding and head
def test_a_loss_that_is_not_finite_is_recovered_from(schedule, holdout, plugin, spoil, tmp_path):
    spoil(4)
    result = run(tiny(), tmp_path, plugin=plugin, compress__reduction=0.4, distill__loss="spoiled",
                 distill__schedule=schedule, distill__holdout=holdout)  # fmt: skip
    (event,) = events(tmp_path / "run", "recovered")
    assert event["reason"].startswith("the loss became nan at step") and event["rate"] == 0.25e-3
    assert event["layer"] and event["step"] < 4 + 1
    check_whole(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gradient_that_is_not_finite_names_the_weight_and_is_recovered_from(schedule, tmp_path, monkeypatch):
    made = student.Student.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.layer.name == "model.layers.1":
            self.trained["mlp.up_proj.B"].register_hook(lambda g: g * NAN if self.steps == 2 else g)

    monkeypatch.setattr(student.Student, "__init__", watched)
    result = run(tiny(), tmp_path, distill__schedule=schedule, distill__epochs=6, compress__init="random")
    (event,) = events(tmp_path / "run", "recovered")
    assert (event["layer"], event["step"], event["weight"]) == ("model.layers.1", 2, "mlp.up_proj.B")
    assert event["reason"] == "the gradient became nan at step 3"
    learned = {e["layer"]: e for e in events(tmp_path / "run", "layer")}["model.layers.1"]
    assert learned["loss"] < learned["initial_loss"], "it goes on to learn"
    check_whole(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plugin", ["decoder", "inkuba"])
@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_an_optimiser_that_diverges_leaves_the_model_no_worse_than_it_began(schedule, plugin, rate, tmp_path):
    changes = {"compress__reduction": 0.4, "distill__schedule": schedule, "distill__learning_rate": rate}
    result = run(tiny(), tmp_path, plugin=plugin, **changes)
    check_whole(result)
    layers = events(tmp_path / "run", "layer")
    assert layers
    sums = [sum(e[key] for e in layers) for key in ("loss", "initial_loss")]
    assert sums[0] <= sums[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layer_that_cannot_learn_keeps_its_starting_factors(schedule, tmp_path):
    changes = {"distill__schedule": schedule, "distill__holdout": 0.0, "distill__loss": "teacher"}
    diverged = run(tiny(), tmp_path, distill__learning_rate=1e30, **changes)
    untrained = run(tiny(), tmp_path, "untrained", **(changes | {"distill__epochs": 0}))
    assert digest(diverged) == digest(untrained)
    told = [e["rate"] for e in events(tmp_path / "run", "recovered") if e["layer"] == "model.layers.0"]
    assert told == [2.5e29, 6.25e28, 0.0], "twice at a lower rate, then no more"


def test_a_resumed_run_has_not_forgotten_how_often_it_recovered(tmp_path, monkeypatch):
    changes = {"distill__schedule": "concurrent", "distill__learning_rate": 1e30, "distill__epochs": 3}
    unbroken = run(tiny(), tmp_path, "unbroken", **changes)
    step, steps = student.Student.step, []

    def stopped(self, *args):
        steps.append(1)
        if len(steps) > 13:  # of the fifth step, the first layer's
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(student.Student, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path, **changes, run__snapshot_seconds=0.0)
    monkeypatch.setattr(student.Student, "step", step)
    counts = []
    restore = snapshot.Snapshot.restore

    def restored(self):
        found = restore(self)
        counts.extend(s.recoveries for s in self.students.values())
        return found

    monkeypatch.setattr(snapshot.Snapshot, "restore", restored)
    resumed = run(tiny(), tmp_path, **changes, run__snapshot_seconds=0.0)
    assert min(counts) > 0
    assert digest(resumed) == digest(unbroken)
    assert [e["rate"] for e in events(tmp_path / "run", "recovered")].count(0.0) == 3


def test_a_snapshot_looks_at_the_losses_that_wait(spoil, tmp_path, monkeypatch):
    """On a GPU losses wait for a while: a state that they show to be broken must not be kept."""
    monkeypatch.setattr(student, "LossLog", waiting_log())
    spoil(1)
    save = snapshot.Snapshot.save
    seen = []

    def saved(self, step):
        save(self, step)
        seen.append([p.isfinite().all() for s in self.students.values() for p in s.trained.values()])

    monkeypatch.setattr(snapshot.Snapshot, "save", saved)
    changes = {"distill__loss": "spoiled", "distill__schedule": "concurrent", "run__snapshot_seconds": 0.0}
    result = run(tiny(), tmp_path, **changes)
    assert seen and all(map(all, seen))
    assert len(events(tmp_path / "run", "recovered")) == 1
    check_whole(result)


def waiting_log():
    class Waiting(student.LossLog):
        def __init__(self, *args):
            super().__init__(*args)
            self.every = 16

    return Waiting


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plugin", ["decoder", "inkuba"])
def test_where_losses_wait_a_broken_state_is_left_as_well(schedule, plugin, spoil, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "LossLog", waiting_log())
    spoil(2)
    changes = {"compress__reduction": 0.4, "distill__loss": "spoiled", "distill__schedule": schedule}
    result = run(tiny(), tmp_path, plugin=plugin, distill__epochs=6, **changes)
    assert len(events(tmp_path / "run", "recovered")) == 1
    check_whole(result)


# --- Factors ---


def test_factors_that_overflow_in_float16_are_rescaled_exactly(register, tmp_path):
    def lopsided(W, rank):
        A, B = initialisers.svd(W, rank)
        return A * 2.0**20, B / 2.0**20

    same = {"model__dtype": "float16", "distill__schedule": "sequential", "distill__epochs": 0}
    expected = check_whole(run(tiny(), tmp_path, "svd", compress__init="svd", **same))
    register(registry.INITIALISERS, "lopsided", lopsided)
    result = run(tiny(), tmp_path, compress__init="lopsided", **same)
    found = check_whole(result)
    ids = token_batches(tiny())[0]
    with torch.no_grad():
        torch.testing.assert_close(found(**ids).logits, expected(**ids).logits, rtol=1e-2, atol=1e-3)
    assert result.plan.ranks and not result.plan.kept


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_learned_and_overflows_in_float16_gives_way_to_the_starting_factors(
    storage, schedule, tmp_path, monkeypatch
):
    finish = student.Student.finish

    def swollen(self):
        if self.layer.name == "model.layers.1":
            self.best.drop()
            with torch.no_grad():
                for name in ("A", "B"):
                    self.trained[f"mlp.up_proj.{name}"].mul_(1e8)
        return finish(self)

    monkeypatch.setattr(student.Student, "finish", swollen)
    changes = {"model__dtype": "float16", "distill__schedule": schedule, "compress__storage": storage}
    result = run(tiny(), tmp_path, **changes)
    (event,) = events(tmp_path / "run", "kept_initial")
    assert event["layer"] == "model.layers.1" and not result.plan.kept
    check_whole(result)


@pytest.fixture
def inf_for(monkeypatch):
    """Has the initialiser return Inf for weights whose name ends so."""

    def plant(*ends):
        call = Initialiser.__call__

        def planted(self, weight, W, rank, known):
            found = call(self, weight, W, rank, known)
            if weight.name.endswith(ends):
                found.A[..., 0, 0] = INF
            return found

        monkeypatch.setattr(Initialiser, "__call__", planted)

    return plant


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_weight_without_finite_factors_stays_dense(schedule, storage, inf_for, tmp_path):
    inf_for("1.self_attn.q_proj", "1.mlp.down_proj")
    result = run(tiny(), tmp_path, distill__schedule=schedule, compress__storage=storage)
    kept = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert set(result.plan.kept) == kept and not kept & set(result.plan.ranks)
    model = check_whole(result)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
    rows = json.loads((tmp_path / "run" / "plan.json").read_text())["weights"]
    assert {r["weight"]: r["kept_dense"] for r in rows if "kept_dense" in r} == dict.fromkeys(
        kept, "its starting factors are not finite"
    )
    assert {e["weight"] for e in events(tmp_path / "run", "kept_dense")} == kept
    # The same command afterwards knows the plan there was.
    again = run(tiny(), tmp_path, distill__schedule=schedule, compress__storage=storage)
    assert again.plan.kept == result.plan.kept and again.plan.after == result.plan.after


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_without_any_is_the_original(schedule, layer, inf_for, tmp_path):
    attention, mlp = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"), ("mlp.gate", "mlp.up", "mlp.down")
    inf_for(*(f".{layer}.{end}_proj" for end in (*attention, *mlp)))
    result = run(tiny(), tmp_path, distill__schedule=schedule)
    assert not any(f".{layer}." in name for name in result.plan.ranks) and result.plan.ranks
    check_whole(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tied_embedding_stays_dense_together_with_its_head(schedule, inf_for, tmp_path):
    inf_for("embed_tokens")
    result = run(tiny(), tmp_path, plugin="inkuba", compress__reduction=0.4, distill__schedule=schedule)
    assert set(result.plan.kept) == {"model.embed_tokens", "lm_head"}
    assert result.plan.after == result.plan.before, "the plugin offers nothing else"
    model = check_whole(result)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_may_have_a_projection_that_stays_dense(inf_for, tmp_path):
    import make

    inf_for("1.mlp.experts.gate")
    torch.manual_seed(0)
    model = make.mixtral().float().eval()
    for schedule in SCHEDULES:
        result = run(model, tmp_path, schedule, "mixtral", token_batches(model, length=8), distill__schedule=schedule)
        assert len(result.plan.kept) == 1
        assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layer_whose_first_loss_is_not_finite_stays_dense(schedule, tmp_path, monkeypatch):
    call = Initialiser.__call__

    def huge(self, weight, W, rank, known):
        A, B = call(self, weight, W, rank, known)
        scale = 1e18 if weight.name.startswith("model.layers.1.mlp") else 1.0
        return Factors(A * scale, B * scale)

    monkeypatch.setattr(Initialiser, "__call__", huge)
    for holdout in (0.3, 0.0):
        result = run(tiny(), tmp_path, f"run-{holdout}", distill__schedule=schedule, distill__holdout=holdout)
        assert set(result.plan.kept) == {n for n in result.plan.weights if ".layers.1." in n}
        check_whole(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("train", ["factors", "layer"])
def test_what_cannot_be_stored_when_a_layer_is_done_stays_dense(schedule, train, tmp_path, monkeypatch):
    finish = student.Student.finish

    def refuse(self):
        found = finish(self)
        if self.layer.name == "model.layers.1":
            found.dense["model.layers.1.mlp.up_proj"] = "of this test"
        return found

    monkeypatch.setattr(student.Student, "finish", refuse)
    result = run(tiny(), tmp_path, distill__schedule=schedule, distill__train=train)
    assert dict(result.plan.kept) == {"model.layers.1.mlp.up_proj": "of this test"}
    check_whole(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stop", ["record", "Student"])
def test_a_run_stopped_after_a_weight_was_kept_dense_ends_the_same(schedule, stop, inf_for, tmp_path, monkeypatch):
    inf_for("1.mlp.gate_proj", "2.self_attn.o_proj")
    changes = {"distill__schedule": schedule, "run__stream_memory": 0}
    unbroken = run(tiny(), tmp_path, "unbroken", **changes)
    with monkeypatch.context() as patch:
        made, seen = student.Student.__init__, []

        def stopped(self, *args, **kwargs):
            seen.append(1)
            if stop == "record" or len(seen) == 2:
                raise KeyboardInterrupt
            return made(self, *args, **kwargs)

        if stop == "record":
            patch.setattr(jobs.Job, "_take_over", stopped)
        else:
            patch.setattr(student.Student, "__init__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), tmp_path, **changes)
    resumed = run(tiny(), tmp_path, **changes)
    assert digest(resumed) == digest(unbroken) and resumed.plan.kept == unbroken.plan.kept
    check_whole(resumed)


def test_nothing_that_is_not_finite_is_written(tmp_path):
    for bad in (torch.tensor([1.0, NAN]), torch.tensor([INF]).half(), torch.tensor([NAN]).to(torch.float8_e4m3fn)):
        with pytest.raises(LillamaError, match=r"x\.safetensors: w: 1 of \d numbers is not finite"):
            tensorfile.write(tmp_path / "x.safetensors", [tensorfile.Entry.of("w", bad)])


def test_a_tied_head_gives_its_inputs_whatever_the_initialiser_names(register, tmp_path):
    """In the concurrent schedule its Gram is that of its inputs, where the initialiser asks for outputs' alone too."""

    def of_outputs(W, rank, output_gram):
        return initialisers.whitened(W, rank, output_gram=output_gram)

    register(registry.INITIALISERS, "of_outputs", of_outputs)
    same = {"plugin": "inkuba", "compress__reduction": 0.4, "distill__epochs": 0, "distill__loss": "teacher"}
    states = []
    for schedule in SCHEDULES:
        result = run(tiny(), tmp_path, schedule, compress__init="of_outputs", distill__schedule=schedule, **same)
        states.append(check_whole(result).state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-5)
