"""Live tracking: events reach the trackers, and a tracker never costs the run."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, tokenizer

import lillama
from lillama.errors import LillamaError
from lillama.report import track


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: the same three functions."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__("trackio")
        self.fails = fails
        self.started: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> None:
        self.started = options

    def log(self, values: dict[str, float]) -> None:
        if self.fails:
            raise ConnectionError("away")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def compress(home: Path) -> dict[str, Any]:
    tiny("mistral").save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text("the cat sat on a mat and ran . " * 60)
    text = str(home / "text.txt")
    recipe = lillama.Recipe.parse(
        {
            "model": {"id": str(home / "model"), "dtype": "float32"},
            "compress": {"reduction": 0.2, "of": "weights", "rank_multiple": 2},
            "distill": {"batch_size": 2},
            "calibration": {"dataset": text, "sequence_length": 16, "tokens": 160},
            "evaluate": {"perplexity": {"dataset": text, "sequence_length": 16, "tokens": 64}},
            "run": {"out": str(home / "out"), "device": "cpu", "compute": "float32", "track": ["trackio"]},
        }
    )
    return lillama.compress(recipe).metrics


def test_losses_and_metrics_reach_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    metrics = compress(tmp_path)
    assert tracker.started["name"] == "out" and tracker.started["config"]["compress"]["reduction"] == 0.2
    sent = {name: value for values in tracker.logged for name, value in values.items()}
    assert sent["after/perplexity/perplexity"] == metrics["after"]["perplexity/perplexity"]
    assert {"model.layers.0/held_out_loss", "model.layers.2/loss"} <= set(sent)
    assert tracker.finished == 1


def test_a_tracker_that_is_away_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(fails=True)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    assert compress(tmp_path)["parameters"]["after"] > 0
    assert tracker.finished == 1


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(LillamaError, match="trackio is not installed"):
        compress(tmp_path)
    assert not (tmp_path / "out").exists()


def test_only_finite_numbers_are_sent() -> None:
    data = {"layer": "l", "loss": 0.5, "bad": float("nan"), "done": True, "note": "x"}
    assert track.numbers("check", data) == {"l/loss": 0.5}
    assert track.numbers("curve", {"perplexity": 3.0}) == {"curve/perplexity": 3.0}
