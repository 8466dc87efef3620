"""A layer whose numbers stop being finite while it learns goes back to a state that is, and on."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from finite_runs import NAN, SCHEDULES, check_whole, digest, events, register_fixture, run  # noqa: F401

from lillama import registry
from lillama.distill import snapshot, student


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
