"""The perplexity of the whole model while it is distilled: its ends are those of the original and of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, tokenizer

import lillama
from lillama.errors import LillamaError
from lillama.run import curve

TEXT = "the cat sat on a mat and ran . " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("curve")
    for name in ("llama", "mistral"):  # tied and untied head
        tiny(name).save_pretrained(home / name)
        tokenizer().save_pretrained(home / name)
    (home / "text.txt").write_text(TEXT)
    return home


def run(home: Path, out: Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    recipe = lillama.Recipe.parse(
        {
            "model": {"id": str(home / name), "dtype": "float32"},
            "compress": {"reduction": 0.2, "of": "weights", "rank_multiple": 2},
            "distill": {"batch_size": 2, "epochs": 2, "learning_rate": 1e-3, "holdout": 0},
            "calibration": {"dataset": str(home / "text.txt"), "sequence_length": 16},
            "evaluate": {"perplexity": {"dataset": str(home / "text.txt"), "sequence_length": 16, "tokens": 64}},
            "run": {"out": str(out), "device": "cpu", "compute": "float32", "curve": 3},
        },
        overrides,
    )
    result = lillama.compress(recipe)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "curve"], result.metrics


@pytest.mark.parametrize(
    ("schedule", "loss", "name"),
    [
        ("sequential", "teacher", "llama"),
        ("sequential", "student", "mistral"),
        ("concurrent", "teacher", "mistral"),
        ("concurrent", "student", "llama"),
    ],
)
@pytest.mark.slow
def test_the_curve_goes_from_the_original_to_the_result(
    home: Path, tmp_path: Path, schedule: str, loss: str, name: str
) -> None:
    overrides = (f"distill.schedule={schedule}", f"distill.loss={loss}")
    points, metrics = run(home, tmp_path / "out", name, *overrides)
    assert len(points) == 4
    before, after = metrics["before"]["perplexity/perplexity"], metrics["after"]["perplexity/perplexity"]
    assert [p["original"] for p in points] == pytest.approx([before] * 4, rel=1e-4)
    assert points[-1]["perplexity"] == pytest.approx(after, rel=1e-4)
    if schedule == "sequential":
        assert [p["layers"] for p in points] == [0, 1, 2, 3]
        assert points[0]["perplexity"] == pytest.approx(before, rel=1e-4), "no layer is done yet"
    else:
        assert points[0]["tokens"] == 0 and points[0]["perplexity"] != pytest.approx(before, rel=1e-6)
    tokens = [p["tokens"] for p in points]
    assert tokens == sorted(tokens) and tokens[-1] > 1000


@pytest.mark.slow
def test_a_curve_changes_nothing_in_the_result(home: Path, tmp_path: Path) -> None:
    for schedule in ("sequential", "concurrent"):
        for points in (0, 3):
            out = tmp_path / f"{schedule}{points}"
            run(home, out, "mistral", f"distill.schedule={schedule}", f"run.curve={points}", "evaluate={}")
        files = [tmp_path / f"{schedule}{points}" / "model" / "model.safetensors" for points in (0, 3)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_layers_above_the_last_planned_one_are_the_originals(home: Path, tmp_path: Path) -> None:
    points, _ = run(
        home, tmp_path / "out", "mistral", "distill.schedule=concurrent", "compress.strategy=bottom",
        "compress.reduction=0.05", "compress.min_rank=4", "compress.rank_step=2", "evaluate={}",
    )  # fmt: skip
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {w["layer"] for w in plan["weights"] if w["rank"]} == {"model.layers.0"}
    assert len(points) == 4 and points[0]["perplexity"] > 1, "on calibration text where no evaluator names another"


def test_what_fails_costs_the_curve_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(curve.perplexity, "token_losses", broken)
    points, metrics = run(home, tmp_path / "out", "mistral", "evaluate={}")
    assert not points and metrics["parameters"]["after"] > 0


def test_a_model_without_text_has_no_curve() -> None:
    recipe = lillama.Recipe.parse(
        {"model": {"id": "x"}, "compress": {"reduction": 0.2}, "calibration": {"dataset": "x"},
         "run": {"out": "x", "curve": 2}}
    )  # fmt: skip
    with pytest.raises(LillamaError, match=r"run\.curve"):
        curve.text(recipe, lambda: None, [{"input_features": None}])
