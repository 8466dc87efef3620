"""Live tracking: events reach the trackers, and a tracker never costs the run."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, tokenizer
from rich.console import Console

import lillama
from lillama.base.progress import Progress
from lillama.errors import LillamaError
from lillama.report import track


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: the same three functions."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("trackio")
        self.fails = fails
        self.started: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **options: Any) -> None:
        if self.fails == "init":
            raise PermissionError("nobody is logged in")
        self.started = options

    def log(self, values: dict[str, float]) -> None:
        if self.fails == "log":
            raise ConnectionError("away")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1
        if self.fails == "finish":
            raise TimeoutError("still away")


def compress(home: Path, progress: Progress | None = None) -> dict[str, Any]:
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
    return lillama.compress(recipe, progress=progress).metrics


@pytest.mark.slow
def test_losses_and_metrics_reach_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    metrics = compress(tmp_path)
    assert tracker.started["name"] == "out" and tracker.started["config"]["compress"]["reduction"] == 0.2
    sent = {name: value for values in tracker.logged for name, value in values.items()}
    assert sent["after/perplexity/perplexity"] == metrics["after"]["perplexity/perplexity"]
    assert {"model.layers.0/held_out_loss", "model.layers.2/loss"} <= set(sent)
    assert tracker.finished == 1


@pytest.mark.parametrize(
    ("fails", "says", "finished"),
    [
        ("init", "trackio is left out: PermissionError: nobody is logged in", 0),
        ("log", "trackio is left out: ConnectionError: away", 1),
        ("finish", "trackio is left out: TimeoutError: still away", 1),
    ],
)
def test_a_tracker_that_fails_does_not_cost_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    says: str,
    finished: int,
) -> None:
    tracker = Tracker(fails)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    console = Console(file=io.StringIO(), width=120)
    assert compress(tmp_path, Progress(console))["parameters"]["after"] > 0
    assert tracker.finished == finished
    assert bool(tracker.logged) == (fails == "finish")
    assert console.file.getvalue().count(says) == 1


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(LillamaError, match="trackio is not installed"):
        compress(tmp_path)
    assert not (tmp_path / "out").exists()


def test_only_finite_numbers_are_sent() -> None:
    data = {"layer": "l", "loss": 0.5, "bad": float("nan"), "done": True, "note": "x"}
    assert track.numbers("check", data) == {"l/loss": 0.5}
    assert track.numbers("curve", {"perplexity": 3.0}) == {"curve/perplexity": 3.0}
