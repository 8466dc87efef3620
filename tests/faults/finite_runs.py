"""What tests of numbers that are not finite share: a small run, its events, and the check that all it left is whole."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors import safe_open

import lillama
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


@pytest.fixture(name="register")
def register_fixture(monkeypatch):
    """Registers a function under a name for one test."""

    def add(of, name, function):
        monkeypatch.setattr(of, "_targets", dict(of._targets))
        of.add(name, function)

    return add
