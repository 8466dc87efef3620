"""benchmarks/frontier.py: points of an original and of results of low rank, in full and in few bits, and a chart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from test_quantize_run import settings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_frontier_of_a_tiny_model(tmp_path, monkeypatch):
    sys.path.insert(0, str(BENCHMARKS))
    import frontier

    given = settings(tmp_path)
    text, length = given["calibration"]["dataset"], 16
    changes = {
        "model.id": given["model"]["id"],
        "calibration": json.dumps(given["calibration"]),
        "compress.strategy": "uniform",
        "compress.init": "svd",
        "compress.of": "weights",
        "compress.rank_multiple": 2,
        "finetune": "null",
        "run.device": "cpu",
        "run.compute": "float32",
    }
    out = tmp_path / "out"
    command = ["frontier.py", "--text", f"own={text}:train", "--reductions", "0.2", "--tokens", "64", "--out", str(out)]
    command += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    measure = frontier.perplexity
    monkeypatch.setattr(frontier, "perplexity", lambda *a, **k: measure(*a, sequence_length=length, **k))
    monkeypatch.setattr(sys, "argv", command)
    frontier.main()
    points = {p["name"]: p for p in map(json.loads, (out / "points.jsonl").read_text().splitlines())}
    assert {p["bits"] for p in points.values()} == {16, 8, 4, 3} and len(points) == 1 + 2 * 3 + 3
    sizes = [points[f"original, {bits} bits, compensated"]["bytes"] for bits in (8, 4, 3)]
    assert points["original, 16 bits"]["bytes"] > sizes[0] > sizes[1] > sizes[2]
    assert points["20% removed, 4 bits"]["bytes"] < points["20% removed, 16 bits"]["bytes"]
    assert (out / "frontier.own.svg").stat().st_size and "20% removed, 8 bits" in (out / "table.md").read_text()
    before = (out / "points.jsonl").read_text()
    frontier.main()  # goes on where it is: nothing is measured twice
    assert (out / "points.jsonl").read_text() == before


def test_a_split_may_be_a_slice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier

    given = ["help=package:pydoc_data.topics:train[80%:]", "other=a/b.txt:test"]
    assert frontier.texts_of(given) == {
        "help": ("package:pydoc_data.topics", "train[80%:]"),
        "other": ("a/b.txt", "test"),
    }
