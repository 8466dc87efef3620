"""Run directories whose files are of any shape: a report is made, or names the file that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lillama.cli import main as cli

GOLDEN = Path(__file__).parent.parent / "golden"


def verb(*arguments: Any) -> int:
    return cli.main([str(one) for one in arguments])


WRONG: list[Any] = [
    [],
    None,
    3,
    "x",
    {"a": []},
    {"parameters": 1, "bytes": [], "before": 3},
    {"weights": {}, "parameters": {}, "reduction": "x"},
    {"weights": [3], "parameters": {"before": 1, "after": 1}, "reduction": 0.5},
    {"details": []},
    {"details": {"harness": {"tasks": {"a": 3}}, "sample": {"completion": 3}}},
    {"details": {"x": {"ratio": {"y": 3}}}},
    {"stages": {"after": {}}},
    {"rows": [{"length": 3, "prefill": {"ratio": [1]}}]},
    {"fingerprint": [1]},
    {"architectures": [3]},
]


@pytest.mark.report
@pytest.mark.parametrize("name", ["plan", "metrics", "evaluation.after", "evaluation.speed", "bench", "MANIFEST"])
def test_a_report_of_files_of_any_shape(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lillama.report.html.charts", lambda record: {})
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    for wrong in WRONG:
        (run / f"{name}.json").write_text(json.dumps(wrong))
        code, said = verb("report", run), capsys.readouterr().err
        assert code == 0 or (code == 2 and f"{name}.json" in said)


@pytest.mark.report
def test_a_report_of_every_value_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lillama.report.html.charts", lambda record: {})  # each is drawn or not for itself
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    refusals = 0
    for name in ("plan.json", "metrics.json"):
        whole = (run / name).read_text()
        held = json.loads(whole)
        for key in held:
            for wrong in (None, [], {}, "x", -1, 0, 10**400, {"before": 0, "after": 0}, [[]], {"a": None}):
                (run / name).write_text(json.dumps({**held, key: wrong}))
                code, said = verb("report", run), capsys.readouterr().err
                assert code == 0 or (code == 2 and name in said)
                refusals += code == 2
        (run / name).write_text(whole)
    assert refusals > 20
    assert verb("report", run) == 0


@pytest.mark.report
def test_a_report_of_events_and_a_recipe_of_any_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    lines = ["3", "[]", "{}", '{"event": 3}', '{"event": "layer"}', '{"event": "layer", "layer": []}', "[" * 100_000]
    lines += ['{"event": "check", "step": [], "held_out_loss": "x", "layer": {}}', '{"event": "curve"}', "\0", "{"]
    (run / "events.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert verb("report", run) == 0
    (run / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert verb("report", run) == 0
    for text in ("", "[]", "3", "model: 3", "model: {id: [1]}", "{", "model: {id: a}\ncompress: []\ndistill: {}"):
        (run / "recipe.resolved.yaml").write_text(text)
        capsys.readouterr()
        assert verb("report", run) == 2
        assert "recipe.resolved.yaml" in capsys.readouterr().err
    (run / "recipe.resolved.yaml").write_bytes(b"\xff\xfe")
    assert verb("report", run) == 2
