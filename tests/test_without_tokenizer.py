"""A model without a tokenizer is compressed and measured as far as nothing reads text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer

import lillama
from lillama import LillamaError
from lillama.evaluate.context import Context, Later, evaluate

BATCHES = [{"input_ids": torch.randint(3, 12, (2, 16), generator=torch.Generator().manual_seed(i))} for i in range(3)]
SPEED = {"speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}}


def run(home: Path, batches: Any, **given: Any) -> Any:
    if not (home / "model").exists():
        tiny().save_pretrained(home / "model")
    recipe = {
        "model": {"id": str(home / "model")},
        "compress": {"reduction": 0.2, "rank_multiple": 2, "strategy": "uniform", "init": "svd"},
        "distill": {"epochs": 0},
        "calibration": {"dataset": str(home / "text.txt"), "sequence_length": 16},
        "run": {"out": str(home / "run")},
    }
    (home / "text.txt").write_text("the cat sat on a mat " * 40)
    return lillama.compress(lillama.Recipe.parse({**recipe, **given}), batches=batches)


def test_what_reads_no_text_runs(tmp_path: Path) -> None:
    result = run(tmp_path, BATCHES, evaluate={"stable_rank": {}, **SPEED})
    for stage in ("before", "after"):
        assert result.metrics[stage]["speed/prefill_tokens_per_second"] > 0
        assert result.metrics[stage]["stable_rank/self_attn.q_proj"] >= 1


@pytest.mark.parametrize("name", ["perplexity", "sample"])
def test_an_evaluator_of_text_says_what_it_lacks(tmp_path: Path, name: str) -> None:
    options = {"perplexity": {"dataset": str(tmp_path / "text.txt"), "split": "train"}, "sample": {"prompt": "the"}}
    with pytest.raises(LillamaError, match=r"there is no tokenizer in .*model'") as caught:
        run(tmp_path, BATCHES, evaluate={name: options[name]})
    assert caught.value.where == f"evaluate.{name}" and "beside the model" in str(caught.value)


def test_calibration_on_text_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match=r"there is no tokenizer in .*model'") as caught:
        run(tmp_path, None)
    assert caught.value.where == "model.id"
    assert not (tmp_path / "run").exists()


def test_a_damaged_tokenizer_is_not_said_to_be_missing(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(LillamaError, match="cannot open the tokenizer"):
        run(tmp_path, None)


def test_a_tokenizer_is_read_once_for_all_evaluators(tmp_path: Path) -> None:
    read = []
    context = Context(Later(lambda: read.append(1) or tokenizer()), "cpu")
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 40)
    section = {f"perplexity/{i}": {"dataset": str(tmp_path / "text.txt"), "split": "train"} for i in range(2)}
    evaluate(tiny(), section, context)
    assert read == [1] and context.tokenizer.eos_token == "</s>"
