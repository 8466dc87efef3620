"""Sweeps: every combination once, failures as rows, tables and charts of what came out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, tokenizer

from lillama.cli import main as cli
from lillama.errors import LillamaError
from lillama.run import sweep, sweepfile, sweeptable

TEXT = "the cat sat on a mat and ran . " * 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny("mistral").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "base.yaml").write_text(f"""
model: {{id: {tmp_path}/model, dtype: float32}}
compress: {{reduction: 0.2, of: weights, rank_multiple: 2}}
distill: {{batch_size: 2}}
calibration: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 160}}
evaluate:
  perplexity: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 64}}
run: {{out: unused, device: cpu, compute: float32, curve: 2}}
""")
    return tmp_path


def write(home: Path, **more: Any) -> Path:
    spec = {
        "base": "base.yaml",
        "axes": {"compress.init": ["svd", "whitened"], "distill.epochs": [0, 1]},
        "out": str(home / "out"),
    } | more
    path = home / "sweep.yaml"
    path.write_text(json.dumps(spec))
    return path


def events(home: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in home.rglob("events.jsonl"))


@pytest.mark.slow
def test_every_combination_runs_once_and_is_tabled(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(home)
    assert cli.main(["sweep", str(path)]) == 0
    assert "whitened" in capsys.readouterr().out
    out = home / "out"
    found = json.loads((out / "sweep.json").read_text())
    assert [list(row["values"].values()) for row in found] == [
        ["svd", "0"], ["svd", "1"], ["whitened", "0"], ["whitened", "1"],
    ]  # fmt: skip
    own = json.loads((out / "init=svd,epochs=1" / "metrics.json").read_text())
    assert found[1]["metrics"] == own and len(found[1]["curve"]) == 3
    table = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["init"] for row in table] == ["svd", "svd", "whitened", "whitened", "original"]
    assert float(table[1]["perplexity"]) == pytest.approx(own["after"]["perplexity/perplexity"], rel=1e-3)
    assert float(table[4]["perplexity"]) == pytest.approx(own["before"]["perplexity/perplexity"], rel=1e-3)
    lines = (out / "sweep.md").read_text().splitlines()
    assert len(lines) == 2 + 5 and all(line.count("|") == lines[0].count("|") for line in lines)
    for name in ("sweep.svg", "curves.svg"):
        assert (out / name).read_text().startswith("<svg")
    # The original is measured once; its numbers are everybody's.
    seconds = [row["metrics"]["seconds"].get("evaluate before", 0) for row in found]
    assert seconds[0] > 0 and not any(seconds[1:])
    assert len({json.dumps(row["metrics"]["before"]) for row in found}) == 1
    # Once more: nothing runs.
    before = events(home)
    assert cli.main(["sweep", str(path)]) == 0
    assert events(home) == before
    # A changed recipe is another run, which the directory refuses: a row with its error.
    assert cli.main(["sweep", str(path), "--set", "calibration.tokens=80"]) == 1
    assert "differs in" in json.loads((out / "sweep.json").read_text())[0]["error"]


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_and_the_others_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"rate": {"tiny": {"distill.learning_rate": 1e-4}, "mad": {"calibration.dataset": f"{home}/gone.txt"},
                     "none": {"distill.epochs": 0}}}  # fmt: skip
    path = write(home, axes=axes, keep=False)
    assert cli.main(["sweep", str(path)]) == 1
    rows = json.loads((home / "out" / "sweep.json").read_text())
    assert ["error" in row for row in rows] == [False, True, False]
    assert "gone.txt" in rows[1]["error"]
    assert not (home / "out" / "rate=tiny" / "model").exists(), "numbers alone were to be kept"
    assert (home / "out" / "rate=tiny" / "metrics.json").exists()
    capsys.readouterr()
    assert cli.main(["sweep", str(path), "--table"]) == 1
    shown = capsys.readouterr().out
    assert "not run" in shown and "tiny" in shown


def test_mistakes_show_before_anything_runs(home: Path) -> None:
    found, base = sweepfile.load(write(home, axes={"compress.init": ["svd", "whitned"]}))
    with pytest.raises(LillamaError, match="whitened"):
        sweep.run(found, base, None)  # type: ignore[arg-type]
    assert not (home / "out").exists()
    assert cli.main(["validate", str(home / "sweep.yaml")]) == 2
    assert cli.main(["validate", str(write(home))]) == 0
    with pytest.raises(LillamaError, match=r"sweep\.yaml:1"):
        sweepfile.load(write(home, axis={}))
    path = home / "empty.yaml"
    path.write_text("- a\n")
    with pytest.raises(LillamaError, match="mapping"):
        sweepfile.load(path)


def rows(axes: dict[str, list[str]], values: list[float]) -> tuple[sweepfile.Sweep, list[sweepfile.Row]]:
    found = sweepfile.Sweep.model_validate({"base": "b", "axes": axes, "out": "o"})
    made = list(sweepfile.rows(found))
    for row, value in zip(made, values, strict=True):
        row.metrics = {
            "before": {"perplexity/perplexity": 9.0}, "after": {"perplexity/perplexity": value},
            "parameters": {"before": 100, "after": 80}, "seconds": {"distil": 3.0},
        }  # fmt: skip
    return found, made


def test_a_chart_over_numbers_has_them_on_its_axis_in_order() -> None:
    found, made = rows({"compress.min_rank": [64, 8], "compress.init": ["svd", "random"]}, [20.0, 30.0, 40.0, 50.0])
    svg = sweeptable.chart(found, made)
    assert svg and "min rank" in svg and "svd" in svg and "random" in svg
    made[0].metrics["after"]["perplexity/perplexity"] = float("inf")
    assert sweeptable.chart(found, made), "what is not finite is left out"
    assert sweeptable.table(found, made)[0]["perplexity"] == "infinite"


def test_a_table_without_numbers_says_why() -> None:
    found, made = rows({"compress.init": ["svd"]}, [20.0])
    made[0].metrics, made[0].error = {}, "out | of memory"
    assert sweeptable.table(found, made) == [{"init": "svd", "error": "out | of memory"}]
    assert "out \\| of memory" in sweeptable.markdown(sweeptable.table(found, made))
    assert sweeptable.chart(found, made) is None and sweeptable.curves(found, made) is None


def sensitivities(home: Path) -> list[str]:
    """What the runs of a sweep did about the sensitivity of the predictions, in their order."""
    done = []
    for row in json.loads((home / "out" / "sweep.json").read_text()):
        lines = [json.loads(line) for line in (home / "out" / row["name"] / "events.jsonl").read_text().splitlines()]
        taken = any(line["event"] == "taken_over" for line in lines)
        done.append("taken" if taken else "measured" if "sensitivity" in row["metrics"]["seconds"] else "neither")
    return done


def weights(home: Path, name: str) -> bytes:
    return (home / "out" / name / "model" / "model.safetensors").read_bytes()


def test_sizes_share_one_measurement_and_end_as_if_alone(home: Path) -> None:
    common = ["compress.init=fisher", "compress.strategy=fisher", "compress.neurons=0.5", "distill.epochs=0"]
    axes = {"compress.reduction": [0.2, 0.3], "compress.storage": ["factors", "pivoted"]}
    assert cli.main(["sweep", str(write(home, axes=axes, set=common, keep=True))]) == 0
    assert sensitivities(home) == ["measured", "taken", "taken", "taken"]
    assert not (home / "out" / "sensitivity").exists()
    shared = weights(home, "reduction=0.3,storage=pivoted")
    # The same run alone, in a sweep that has no other.
    axes = {"compress.reduction": [0.3], "compress.storage": ["pivoted"]}
    alone = write(home, axes=axes, set=common, keep=True, out=str(home / "alone" / "out"))
    assert cli.main(["sweep", str(alone)]) == 0
    assert sensitivities(home / "alone") == ["measured"]
    assert weights(home / "alone", "reduction=0.3,storage=pivoted") == shared


def test_numbers_of_bytes_share_one_measurement(home: Path) -> None:
    few = ["compress.reduction=null", "compress.init=fisher", "compress.strategy=fisher", "distill.epochs=0"]
    few += ["compress.of=model", "quantize.what=all", "quantize.group_size=32"]
    axes = {"compress.size": [0.3, 0.25], "quantize.bits": ["auto", 4]}
    assert cli.main(["sweep", str(write(home, axes=axes, set=few))]) == 0
    assert sensitivities(home) == ["measured", "taken", "taken", "taken"]


@pytest.mark.parametrize(
    "axes", [{"compress.fisher_tokens": [32, 64]}, {"run.seed": [0, 1]}, {"calibration.tokens": [80, 160]}]
)
def test_what_is_measured_otherwise_is_measured_again(home: Path, axes: dict[str, list[int]]) -> None:
    common = ["compress.init=fisher", "compress.strategy=fisher", "distill.epochs=0"]
    assert cli.main(["sweep", str(write(home, axes=axes, set=common))]) == 0
    assert sensitivities(home) == ["measured", "measured"]
