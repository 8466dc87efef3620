"""Two models timed in turn: ratios of neighbours, lengths that do not fit, and the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer

from lillama.cli import main as cli
from lillama.evaluate import bench, speed
from lillama.evaluate.speed import Timing
from lillama.evaluate.turns import is_out_of_memory

TEXT = "the cat sat on a mat and ran . " * 60


class Pair:
    """Models whose speeds are made up; notes who was asked when."""

    def __init__(self, seconds: Any, limit: int = 10**9) -> None:
        self.models = [tiny(), tiny()]
        self.device = torch.device("cpu")
        self.asked: list[int] = []
        self.seconds, self.limit = seconds, limit

    def timed(self, which: int, prompt: Any, new_tokens: int) -> Timing:
        self.asked.append(which)
        if prompt.shape[1] > self.limit and which == 0:
            raise torch.OutOfMemoryError("too much")
        return Timing(self.seconds(which, len(self.asked)), 2.0, 1000)


def rows(pair: Pair, **settings: Any) -> list[dict[str, Any]]:
    return list(bench.rows(pair, bench.Settings(**{"new_tokens": 4, **settings}), lambda text: None))


def test_models_alternate_and_a_ratio_is_that_of_neighbours() -> None:
    """The machine gets slower all the time: each model's median says nothing, the neighbours' ratio does."""
    pair = Pair(lambda which, n: float((n + 1) // 2) * (2.0 if which == 0 else 1.0))
    (row,) = rows(pair, batch_size=3, lengths=[10], repeats=3)
    assert pair.asked == [1, 0, 0, 1, 1, 0, 0, 1], "a warm-up, then three rounds in alternating order"
    assert row["prefill"]["ratio"] == [2.0, 2.0, 2.0]
    assert row["prefill"]["original"] == 3 * 10 / 6.0 and row["prefill"]["compressed"] == 3 * 10 / 3.0
    assert row["decode"] == {"original": 6.0, "compressed": 6.0, "ratio": [1.0, 1.0, 1.0]}
    weights = speed.weight_bytes(pair.models[0])
    assert row["peak_memory_bytes"] == {"original": weights + 1000, "compressed": weights + 1000}


def test_out_of_memory_is_a_row_and_the_other_model_still_counts() -> None:
    pair = Pair(lambda which, n: 1.0, limit=20)
    first, second = rows(pair, lengths=[10, 30], repeats=1)
    assert "note" not in first
    assert second["note"] == "original: out of memory"
    assert list(second["prefill"]) == ["compressed"]


def test_lengths_beyond_the_positions_or_the_time_are_rows_with_a_note() -> None:
    found = rows(Pair(lambda which, n: 5.0), lengths=[40, 10, 60, 20], repeats=1, seconds=50)
    assert [row["length"] for row in found] == [10, 20, 40, 60]
    assert found[1]["note"] == "not tried: it would take about 56 s"
    assert found[3]["note"] == "more than the 64 positions of the model"


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(which: int, n: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        rows(Pair(broken), lengths=[10])
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))


def test_the_verb_times_a_run_against_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("mistral").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.yaml").write_text(f"""
model: {{id: {tmp_path}/model, dtype: float32}}
compress: {{reduction: 0.2, of: weights, rank_multiple: 2, init: svd}}
distill: {{epochs: 0}}
calibration: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 64}}
run: {{out: {tmp_path}/out, device: cpu, compute: float32}}
""")
    assert cli.main(["run", str(tmp_path / "recipe.yaml")]) == 0
    options = ["--lengths", "8,2048", "--new-tokens", "2", "--repeats", "1", "--device", "cpu"]
    assert cli.main(["bench", str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr().out
    assert "prefill" in shown and "more than the 64 positions" in shown
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    sizes = [model["parameters"] for model in found["models"].values()]
    assert sizes[1] < sizes[0] and found["models"]["original"]["place"] == f"{tmp_path}/model"
    assert found["rows"][0]["prefill"]["ratio"][0] > 0
    two = ["bench", str(tmp_path / "model"), str(tmp_path / "out" / "model"), *options, "--json"]
    assert cli.main(two) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["length"] == 8
    assert cli.main(["bench", str(tmp_path / "model"), *options]) == 2
    assert "not a finished run" in capsys.readouterr().err
