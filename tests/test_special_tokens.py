"""Windows of text stand between the special tokens that the tokenizer itself puts around a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import lillama
from lillama.data.special import Around, find_around
from lillama.data.text import token_blocks
from lillama.errors import LillamaError
from lillama.evaluate.context import Context, evaluate
from lillama.finetune.data import IGNORED, text_examples
from lillama.recipe.schema import Calibration, Finetune
from lillama.run import curve

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]
BOS, EOS = 1, 2


def tokenizer_of(template: str, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """The tokenizer of eight words, which puts around a text what `template` says."""
    from conftest import tokenizer

    made = tokenizer()
    special = [("<s>", BOS), ("</s>", EOS)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made.add_special_tokens({"bos_token": "<s>"})
    made.eos_token = eos
    return made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["the cat sat on a mat and ran", "a mat", "the cat ran and sat on the mat", "and the cat sat"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def blocks(tokenizer: Any, path: Path, length: int, **options: Any) -> list[list[int]]:
    data = Calibration(dataset=str(path), sequence_length=length, **options)
    return token_blocks(tokenizer, data).tolist()


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("$A", Around()),
        ("<s> $A", Around((BOS,))),
        ("$A </s>", Around((), (EOS,))),
        ("<s> $A </s>", Around((BOS,), (EOS,))),
        ("<s> <s> $A", Around((BOS, BOS))),
    ],
)
def test_what_stands_around_a_text_is_found(template: str, found: Around) -> None:
    assert find_around(tokenizer_of(template), "auto") == found
    assert find_around(tokenizer_of(template), "text") == Around()


def test_every_window_begins_with_bos_once_and_no_word_is_lost(rows: Path) -> None:
    tokenizer = tokenizer_of("<s> $A")
    text = [i for block in blocks(tokenizer, rows, 10, special_tokens="text") for i in block]
    windows = blocks(tokenizer, rows, 5)
    assert {len(window) for window in windows} == {5}
    assert all(window[0] == BOS and BOS not in window[1:2] for window in windows)
    words = [i for window in windows for i in window if i != BOS]
    wanted = [i for i in text if i != BOS]
    assert words[: len(wanted)] == wanted[: len(words)] and len(words) >= 20
    assert blocks(tokenizer, rows, 5, special_tokens="text")[1][0] != BOS
    assert len(blocks(tokenizer, rows, 5, tokens=10)) == 2, "what is added counts as well"


def test_a_tokenizer_that_adds_nothing_changes_nothing(rows: Path) -> None:
    tokenizer = tokenizer_of("$A")
    assert blocks(tokenizer, rows, 5) == blocks(tokenizer, rows, 5, special_tokens="text")


@pytest.mark.parametrize("eos", ["</s>", None])
def test_an_encoder_sees_whole_sequences_with_rows_parted_inside(rows: Path, eos: str | None) -> None:
    tokenizer = tokenizer_of("<s> $A </s>", eos)
    windows = blocks(tokenizer, rows, 8)
    assert len(windows) >= 3
    for window in windows:
        assert window[0] == BOS and window[-1] == EOS
        assert BOS not in window[1:], "it stands at no other place"
        assert window[1] != EOS, "the end of a row that was cut off is not the begin of the next window"
    assert any(EOS in window[1:-1] for window in windows), "rows are parted"


def test_a_window_without_room_is_refused(rows: Path) -> None:
    with pytest.raises(LillamaError, match="2 special tokens") as caught:
        blocks(tokenizer_of("<s> $A </s>"), rows, 2)
    assert caught.value.where == "calibration.sequence_length"
    assert "special_tokens: text" in str(caught.value)


def perplexity_of(model: Any, tokenizer: Any, **options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    context = Context(tokenizer, "cpu")
    return evaluate(model, {"perplexity": options}, context), context.details


def test_perplexity_gives_bos_to_every_window_and_predicts_from_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 4))
    model, tokenizer = tiny(), tokenizer_of("<s> $A </s>")
    found, details = perplexity_of(model, tokenizer, dataset=str(path), sequence_length=9)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids), 8):
        window = torch.tensor([[BOS, *ids[start : start + 8]]])
        with torch.no_grad():
            p = model(window).logits[0].double().log_softmax(-1)
        losses += [-float(p[i, window[0, i + 1]]) for i in range(8)]
    assert found["perplexity/tokens"] == len(losses) == 32, "the first word is predicted, BOS is not"
    assert found["perplexity/perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert details["perplexity"]["windows"] == {"special_tokens": "auto", "before": ["<s>"], "length": 9}
    plain, details = perplexity_of(model, tokenizer, dataset=str(path), sequence_length=9, special_tokens="text")
    assert plain["perplexity/tokens"] == 3 * 8 and plain != found
    assert details["perplexity"]["windows"]["before"] == []


def test_fine_tuning_and_the_curve_read_the_same_windows(rows: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("<s> <s> $A </s>")
    given: dict[str, Any] = {
        "model": {"id": "x"}, "compress": {"reduction": 0.2}, "run": {"out": "x", "curve": 2},
        "calibration": {"dataset": str(rows)},
        "evaluate": {"perplexity": {"dataset": str(rows), "split": "train", "sequence_length": 6}},
    }  # fmt: skip
    recipe = lillama.Recipe.parse(given)
    for example in text_examples(tokenizer, recipe, Finetune(sequence_length=6)):
        assert example["input_ids"][:2].tolist() == [BOS, BOS] and example["input_ids"][2] != BOS
        assert example["labels"].tolist() == [IGNORED, IGNORED, *example["input_ids"][2:].tolist()]
    plain = text_examples(tokenizer, recipe, Finetune(sequence_length=6, special_tokens="text"))
    assert any(example["input_ids"][0] != BOS for example in plain)
    assert all(example["labels"].equal(example["input_ids"]) for example in plain)
    found = curve.text(recipe, lambda: tokenizer, [{"input_ids": torch.zeros(1, 6)}])
    assert found is not None and found.before == (BOS, BOS) and found.given == 2
    assert all(ids[:2].tolist() == [BOS, BOS] for ids in found.ids)
