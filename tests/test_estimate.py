"""What a run is estimated to need: the numbers of a few recipes, and which device they are of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import CONFIGS, tiny

from lillama.pretrained.predictions import LOGITS
from lillama.run import duration, estimate, prepare
from lillama.run.counts import Counts
from lillama.run.speeds import Speeds, measure_speeds
from lillama.testing import recipe_for

SPEEDS = Speeds(*[1e9] * len(Speeds._fields))
# (memory, disk, seconds) of tiny models on a CPU at 10^9 operations a second of every kind.
ESTIMATES: dict[str, tuple[str, dict[str, Any], tuple[int, int, float | None]]] = {
    "sequential": ("llama", {}, (607_468_032, 8_179_200, 2.116412416)),
    "concurrent": (
        "llama-bias",
        {"distill.schedule": "concurrent", "distill.train": "layer"},
        (606_184_832, 8_774_144, 2.182850304),
    ),
    "concurrent, tied": (
        "llama",
        {"distill.schedule": "concurrent", "distill.loss": "teacher"},
        (604_267_392, 8_746_496, 1.344922624),
    ),
    "concurrent, a head with a bias": (
        "phi",
        {"distill.schedule": "concurrent"},
        (605_550_592, 8_692_352, 2.029352697),
    ),
    "low memory": (
        "phi3",
        {"distill.schedule": "concurrent", "run.low_memory": True},
        (604_841_472, 8_853_120, 2.109638528),
    ),
    "measured": (
        "qwen3",
        {"compress.strategy": "fisher", "compress.init": "fisher"},
        (609_603_456, 8_416_896, 4.512962176),
    ),
    "in files": ("mistral", {"run.stream_memory": 1e-6}, (605_895_168, 9_655_808, 2.116722816)),
    "fine-tuned": (
        "llama",
        {"finetune.teacher": 0.5, "finetune.steps": 3, "finetune.batch_size": 64},
        (1_023_451_904, 9_334_272, 31.309287219),
    ),
    "of unknown length": ("llama", {"calibration.tokens": None}, (605_895_168, 8_179_200, None)),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_estimates_of_a_few_recipes(name, tmp_path, monkeypatch):
    model, changes, expected = ESTIMATES[name]
    tiny(model).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(duration, "measure_speeds", lambda run: SPEEDS)
    settings = recipe_for(tmp_path / "model", tmp_path / "run").model_dump(mode="json")
    for key, value in {"calibration.tokens": 4096, "run.stream_memory": 1.0, **changes}.items():
        section, _, option = key.partition(".")
        settings[section] = {**(settings[section] or {}), option: value}
    prepared = prepare.prepare(prepare.Recipe.parse(settings))
    found = estimate.estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device)
    memory, disk, seconds = expected
    assert (found.memory, found.disk) == (memory, disk)
    assert found.seconds == pytest.approx(seconds)


def test_speeds_are_measured_of_what_the_run_computes(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "model")
    settings = recipe_for(tmp_path / "model", tmp_path / "run").model_dump(mode="json")
    of = {}
    for compute in ("float32", "bfloat16"):
        settings["run"]["compute"] = compute
        prepared = prepare.prepare(prepare.Recipe.parse(settings))
        of[compute] = measure_speeds(Counts(prepared.source, prepared.plan, prepared.recipe, prepared.device))
    assert all(0 < one < 1e16 for speeds in of.values() for one in speeds)
    assert of["bfloat16"].evaluating == of["bfloat16"].single  # of a checkpoint in float32


def test_the_time_of_every_kind_of_work_is_in_the_estimate(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(duration, "measure_speeds", lambda run: SPEEDS)
    settings = recipe_for(tmp_path / "model", tmp_path / "run").model_dump(mode="json")
    settings["calibration"]["tokens"] = 4096

    def of(**changes):
        changed = {name: {**(settings[name] or {}), **part} for name, part in changes.items()}
        prepared = prepare.prepare(prepare.Recipe.parse(settings | changed))
        counts = Counts(prepared.source, prepared.plan, prepared.recipe, prepared.device)
        assert duration.seconds(counts) == sum(duration.by_phase(counts).values())
        return {name for name, time in duration.by_phase(counts).items() if time > 0}

    fisher = {"strategy": "fisher", "init": "fisher"}
    assert of() == {"files", "distilling"}
    assert of(compress=fisher, distill={"epochs": 0}) == {"files", "activations", "sensitivity", "decompositions"}
    assert of(finetune={"steps": 3}) == {"files", "distilling", "fine-tuning"}


def test_the_logits_of_a_wide_vocabulary_are_estimated_as_they_are_made(tmp_path):
    # With all logits of a batch at once this was 5.9 GiB, and the run took 14.1.
    settings = recipe_for(tmp_path / "model", tmp_path / "run").model_dump(mode="json")
    settings["compress"] |= {"strategy": "fisher", "init": "fisher", "rank_multiple": 2}
    settings["distill"]["batch_size"], settings["calibration"]["sequence_length"] = 64, 64
    needed = {}
    for vocabulary in (97, 262_144):
        config = copy.deepcopy(CONFIGS["llama"])
        config.vocab_size = vocabulary
        prepared = prepare.prepare(prepare.Recipe.parse(settings), config)
        needed[vocabulary] = estimate.estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device).memory
    table, logits = 4 * 262_144 * 32, 4 * LOGITS
    assert table + 3 * logits < needed[262_144] - estimate.PROCESS_BYTES < 2 * table + 5 * logits
    assert needed[97] < estimate.PROCESS_BYTES + 100_000_000


def test_the_time_of_perplexity_and_of_speed_is_that_of_every_model_that_comes_out(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "model")
    (text := tmp_path / "text.txt").write_text("to be read")
    read = {"perplexity": {"dataset": str(text), "tokens": 1000}}
    monkeypatch.setattr(duration, "measure_speeds", lambda run: SPEEDS)
    settings = recipe_for(tmp_path / "model", tmp_path / "run").model_dump(mode="json")
    settings["calibration"]["tokens"] = 4096

    def of(evaluate, finetune=None):
        prepared = prepare.prepare(prepare.Recipe.parse(settings | {"evaluate": evaluate, "finetune": finetune}))
        found = estimate.estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device)
        return found.seconds, prepared.plan

    nothing, plan = of({})
    perplexity, _ = of(read)
    assert perplexity - nothing == pytest.approx(2 * 1000 * (plan.before + plan.after) / 1e9)
    speed, _ = of({"speed": {"new_tokens": 10, "repeats": 4}})
    assert speed - nothing == pytest.approx(4 * (plan.before + plan.after) * 5 * 10 / duration.READING["cpu"])
    learning = {"teacher": 1.0, "steps": 3, "batch_size": 1}
    more = of(read, learning)[0] - of({}, learning)[0]
    assert more == pytest.approx(2 * 1000 * (plan.before + 2 * plan.after) / 1e9)
