"""benchmarks/gpu.py without a GPU: it runs with tiny shapes, a part that fails stops no other, and time is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, which leaves the environment alone."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "use_checkout", lambda folder: None)
    return module


def run(gpu: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(out), *options])
    code: int = gpu.main()
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_the_dry_mode_measures_layers_and_speed_though_a_part_fails(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contract itself is what every plugin's tests run."""

    def broken(bench: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(gpu.PARTS, "contract", broken)
    monkeypatch.setattr(gpu, "SHAPES", {name: gpu.SHAPES[name] for name in ("mistral-7b", "mixtral-8x7b")})
    code, found = run(gpu, tmp_path / "gpu.json", monkeypatch)
    assert code == 1, "something was not done"
    assert found["parts"]["contract"]["ended"] == "RuntimeError: no kernel image is available"
    assert found["parts"]["layers"]["ended"] == found["parts"]["speed"]["ended"] == "done"
    for name in ("mistral-7b", "mixtral-8x7b"):
        layer = found["layers"][name]
        assert set(layer["per_layer"]) == set(gpu.PHASES) and all(took > 0 for took in layer["per_layer"].values())
        assert sum(layer["per_layer"].values()) * layer["built"] <= layer["seconds"]
        assert layer["estimated_bytes"] > 0 and layer["projected_minutes"] > 0
    assert found["speed"]["numbers_ratio"] > 1
    assert [(row["length"], row["compiled"]) for row in found["speed"]["rows"]] == [
        (length, compiled) for length in (8, 16) for compiled in (False, True)
    ]
    said = capsys.readouterr().out
    assert said.startswith("Not a measurement") and "not done: contract" in said


def test_the_contract_runs_where_the_card_is_told(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("lillama.testing.check_architecture", lambda *given, **how: asked.append(how["device"]))
    bench = gpu.Bench("cpu", True, tmp_path)
    gpu.contract(bench)
    assert asked == ["cpu"] and bench.found["contract"]["mistral-7b"]["result"] == "kept"


def test_a_part_that_takes_too_long_is_cut_off(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.SECONDS, "speed", 0.2)
    monkeypatch.setitem(gpu.PARTS, "speed", lambda bench: time.sleep(30))
    start = time.monotonic()
    _, found = run(gpu, tmp_path / "gpu.json", monkeypatch, "--parts", "speed")
    assert found["parts"]["speed"]["ended"].startswith("TimeoutError: cut off after")
    assert time.monotonic() - start < 20


def test_missing_packages_are_named_and_spare_ones_are_not(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    gone = ("pydantic", "yaml", "datasets", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    assert "pip install --no-deps pydantic pyyaml\n" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()
