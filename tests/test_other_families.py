"""benchmarks/other_families.py: small models of other families, made smaller and put into few bits, and a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from speech_models import folder, save

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT = "the cat sat on a mat and ran . a dog ran after the cat and sat on the mat . " * 60
SMALL = ["calibration.tokens=256", "compress.fisher_tokens=64", "compress.rank_multiple=2", "run.device=cpu"]
SPOKEN = ["calibration.split=train", "compress.rank_multiple=2", "distill.batch_size=2", "distill.epochs=0"]


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import other_families as families

    monkeypatch.setattr(families, "LENGTH", 16)
    return families


def points(families, capsys, monkeypatch, *words: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["families.py", *words])
    families.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.mark.slow
def test_a_mixtral_and_a_mamba_in_few_bits(tmp_path, families, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    where = ["--text", str(tmp_path / "text.txt"), "--learned", "train", "--held-out", "train"]
    size = ["--vocabulary", "260", "--width", "32", "--layers", "1", "--steps", "2", "--length", "16", "--updates", "1"]
    fitted = ["--tokens", "128", "--quantize", json.dumps({"tokens": 64}), "--out", str(tmp_path / "out")]
    found = points(families, capsys, monkeypatch, *where, *size, *fitted, *settings(*SMALL))
    assert [(p["family"], p["bits"]) for p in found] == [(f, b) for f in ("mixtral", "mamba") for b in (16, 16, 8, 4)]
    originals, smaller, eight, four = (found[i::4] for i in range(4))
    assert all(p["perplexity"] > 1 and p["unigram"] > 1 for p in originals)
    for full, *few in zip(smaller, eight, four):
        assert all(p["ratio"] == p["perplexity"] / full["perplexity"] for p in few)
    assert all(abs(p["ratio"] - 1) < 0.02 for p in eight)
    assert "mamba, 20 % removed | 4 |" in (tmp_path / "out" / "table.md").read_text()
    config = json.loads((tmp_path / "out" / "mixtral" / "quantized" / "config.json").read_text())
    kinds = {how["kind"] for how in config["quantization_config"]["modules"].values()}
    assert kinds == {"linear", "experts"}, "experts are what is large in a Mixtral"


@pytest.mark.slow
def test_a_whisper_in_few_bits(tmp_path, families, capsys, monkeypatch):
    place, speech = save(tmp_path / "whisper"), folder(tmp_path / "speech", 4, "hello")
    given = ["--only", "whisper", "--whisper", str(place), "--speech", str(speech), "--heard", str(speech)]
    fitted = ["--updates", "1", "--quantize", json.dumps({"tokens": 16}), "--out", str(tmp_path / "out")]
    found = points(families, capsys, monkeypatch, *given, *fitted, *settings(*SPOKEN, "run.device=cpu"))
    assert [p["bits"] for p in found] == [16, 16, 8, 4] and all(p["wer"] >= 0 for p in found)
    assert abs(found[2]["ratio"] - 1) < 0.02
