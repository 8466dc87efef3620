"""Models that a run measures in turn: who is asked when, what a drift of the machine does, and where it shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer
from rich.console import Console

import lillama
from lillama import registry
from lillama.base.progress import Progress
from lillama.cli import show
from lillama.evaluate import in_turn
from lillama.evaluate.context import Context, evaluate, measured_in_turn
from lillama.evaluate.speed import Timing
from lillama.evaluate.turns import Turns
from lillama.recipe.schema import Recipe
from lillama.report import html as report
from lillama.report import record

TEXT = "the cat sat on a mat and ran . " * 60
RATES = ("speed/prefill_tokens_per_second", "speed/decode_tokens_per_second")


def recipe(evaluators: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"id": "x"},
            "compress": {"reduction": 0.2},
            "calibration": {"dataset": "x.txt"},
            "run": {"out": "x"},
            "evaluate": evaluators,
        }
    )


class Machine:
    """Takes the place of timing: notes which model was timed, and how long that took by its pace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: Callable[[int], float]) -> None:
        self.asked: list[Any] = []
        self.pace = pace
        monkeypatch.setattr("lillama.evaluate.speed.timed", self.timed)

    def timed(self, model: Any, prompt: torch.Tensor, new_tokens: int) -> Timing:
        self.asked.append(model)
        seconds = self.pace(len(self.asked))
        return Timing(seconds, 2 * seconds)


def contexts(*stages: str) -> dict[str, Context]:
    return {stage: Context(None, "cpu") for stage in stages}


def test_the_order_alternates_and_every_stage_gets_metrics_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda n: 1.0)
    models = [tiny(), tiny(seed=1), tiny(seed=2)]
    plan = recipe({"speed/own": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 2, "lengths": [16]}})
    found = in_turn.evaluate_in_turn(plan, Turns(models, torch.device("cpu")), contexts("before", "after", "finetuned"))
    order = [models.index(model) for model in machine.asked]
    assert order == [2, 1, 0, 0, 1, 2, 2, 1, 0] * 2, "a warm-up and two rounds, there and back, for either length"
    for stage in ("before", "after", "finetuned"):
        metrics = found[stage].metrics
        assert metrics["own/prefill_tokens_per_second"] == 8 and metrics["own/decode_tokens_per_second"] == 2
        assert metrics["own/prefill_16_tokens_per_second"] == 16 and metrics["own/weight_bytes"] > 0
    assert found["before"].details == {}
    names = [f"own/{phase}{infix}_tokens_per_second" for infix in ("", "_16") for phase in ("prefill", "decode")]
    for stage in ("after", "finetuned"):
        assert found[stage].details == {"speed/own": {"ratio": {name: [1.0, 1.0, 1.0] for name in names}}}


def test_a_machine_that_slows_down_makes_no_difference_where_measuring_apart_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowing(n: int) -> float:
        return 1 + 0.05 * n

    models = [tiny(), tiny()]
    plan = recipe({"speed": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 5}})
    Machine(monkeypatch, slowing)
    found = in_turn.evaluate_in_turn(plan, Turns(models, torch.device("cpu")), contexts("before", "after"))
    for name, (middle, low, high) in found["after"].details["speed"]["ratio"].items():
        assert name in RATES and low <= middle <= high
        assert middle == pytest.approx(1, abs=0.05) and low > 0.9 and high < 1.1
        assert found["after"].metrics[name] == pytest.approx(found["before"].metrics[name], rel=0.05)
    Machine(monkeypatch, slowing)
    before, after = (evaluate(model, plan.evaluate, Context(None, "cpu")) for model in models)
    assert after[RATES[0]] < 0.8 * before[RATES[0]], "which says something of the machine, not of the models"


def test_models_without_room_for_each_other_take_turns_on_the_device() -> None:
    class Model:
        def __init__(self) -> None:
            self.place = "cpu"

        def to(self, device: Any) -> None:
            if str(device) != "cpu" and any(other.place != "cpu" for other in models if other is not self):
                raise torch.OutOfMemoryError("one at a time")
            self.place = str(device)

    models: list[Model] = []
    models += [Model(), Model(), Model()]
    turns = Turns(models, torch.device("cuda"))
    assert not turns.together
    for which in (0, 2, 1):
        assert turns.run(which, lambda model: [other.place for other in models])[which] == "cuda"
        assert [other.place for other in models].count("cuda") == 1


def test_models_that_leave_no_room_for_the_work_go_until_their_turn() -> None:
    class Model:
        place = "cpu"

        def to(self, device: Any) -> None:
            self.place = str(device)

    models = [Model(), Model()]

    def work(model: Model) -> str:
        if all(one.place == "cuda" for one in models):
            raise torch.OutOfMemoryError("no room for a cache")
        return model.place

    turns = Turns(models, torch.device("cuda"))
    assert turns.together
    assert [turns.run(which, work) for which in (1, 0, 1)] == ["cuda"] * 3 and not turns.together


def test_an_evaluator_of_ones_own_may_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def heat_in_turn(turns: Turns, given: list[Context], *, watts: int) -> list[dict[str, float]]:
        seen.append((turns.models, [context.where for context in given], watts))
        given[1].details["ratio"] = {"heat": [0.5, 0.4, 0.6]}
        return [{"heat": 4}, {"heat": 2}]

    @measured_in_turn(heat_in_turn)
    def heat(model: Any, context: Context, *, watts: int = 3) -> dict[str, float]:
        return {"heat": 9}

    monkeypatch.setattr(registry.EVALUATORS, "_targets", dict(registry.EVALUATORS._targets))
    registry.EVALUATORS.add("heat", heat)
    plan = recipe({"heat": {}, "sample": {"prompt": "the"}})
    assert [list(part) for part in in_turn.divided(plan)] == [["sample"], ["heat"]]
    turns = Turns([], torch.device("cpu"))
    found = in_turn.evaluate_in_turn(plan, turns, contexts("before", "after"))
    assert seen == [([], ["evaluate.heat"] * 2, 3)]
    assert [one.metrics for one in found.values()] == [{"heat/heat": 4.0}, {"heat/heat": 2.0}]
    assert found["after"].details == {"heat": {"ratio": {"heat/heat": [0.5, 0.4, 0.6]}}}
    assert evaluate(None, recipe({"heat": {}}).evaluate, Context(None, "cpu")) == {"heat/heat": 9.0}, (
        "of one model alone"
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny("mistral").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.yaml").write_text(f"""
model: {{id: {tmp_path}/model, dtype: float32}}
compress: {{reduction: 0.2, of: weights, rank_multiple: 2, init: svd}}
distill: {{epochs: 0}}
calibration: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 64}}
evaluate:
  speed: {{prompt_tokens: 8, new_tokens: 4, repeats: 3}}
  perplexity: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 64}}
run: {{out: {tmp_path}/out, device: cpu, compute: float32}}
""")
    return tmp_path


def sizes(models: list[Any]) -> list[int]:
    return [sum(p.numel() for p in model.parameters()) for model in models]


@pytest.mark.report
@pytest.mark.slow
def test_a_run_times_its_models_in_turn_once_and_says_how_sure_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda n: 1.0 if n % 2 else 1.25)
    given = Recipe.load(home / "recipe.yaml")
    result = lillama.compress(given)
    large, small = result.plan.before, result.plan.after
    assert sizes(machine.asked) == [small, large, large, small, small, large, large, small]
    for stage in ("before", "after"):
        assert {*RATES, "speed/weight_bytes", "perplexity/perplexity"} <= set(result.metrics[stage])
    ratio = result.details["after"]["speed"]["ratio"][RATES[0]]
    assert ratio == [0.8, 0.8, 1.25], "the rounds took 1 and 1.25, 1 and 1.25, 1.25 and 1 seconds"
    held = json.loads((home / "out" / "evaluation.speed.json").read_text())
    assert held["stages"]["after"]["details"]["speed"]["ratio"][RATES[0]] == ratio
    assert "speed" not in json.loads((home / "out" / "evaluation.before.json").read_text())["evaluate"]
    console = Console(file=io.StringIO(), width=160)
    console.print(show.result(result, given))
    assert console.file.getvalue().count("x 0.80 (0.80 to 1.25)") == 2  # type: ignore[attr-defined]
    page = report.render(record.read(home / "out"))
    assert page.count("x 0.80 (0.80 to 1.25)") == 2 and "Measured in turn" in page
    # Once more: nothing is timed, and the same is known.
    again = lillama.compress(given)
    assert len(machine.asked) == 8
    assert again.metrics["after"] == result.metrics["after"] and again.details == result.details
    # Other options are another measurement, of the speed alone.
    lillama.compress(Recipe.load(home / "recipe.yaml", ["evaluate.speed.repeats=1"]))
    assert len(machine.asked) == 8 + 4


def test_without_memory_for_all_models_each_is_timed_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda n: 1.0)
    monkeypatch.setattr(in_turn, "_fit", lambda places, device: False)
    console = Console(file=io.StringIO(), width=120)
    result = lillama.compress(Recipe.load(home / "recipe.yaml"), progress=Progress(console))
    assert sizes(machine.asked) == [result.plan.before] * 4 + [result.plan.after] * 4
    assert result.metrics["after"][RATES[0]] == 8 and "speed" not in result.details["after"]
