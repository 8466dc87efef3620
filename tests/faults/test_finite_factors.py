"""Factors that are not finite, or not in the type of the checkpoint: rescaled, replaced, or the weight stays dense."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny
from finite_runs import INF, SCHEDULES, check_whole, digest, events, register_fixture, run  # noqa: F401
from transformers import AutoModelForCausalLM

import lillama
from lillama import registry
from lillama.distill import job as jobs
from lillama.distill import student
from lillama.factorise import initialisers
from lillama.factorise.start import Initialiser
from lillama.lowrank.storage import Factors
from lillama.testing import token_batches


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
