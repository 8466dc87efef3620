"""Rows rendered as text, and the blocks they become."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lillama.data.batches import fingerprint, text_batches
from lillama.data.render import render_rows
from lillama.data.stream import chunks
from lillama.data.text import token_blocks
from lillama.errors import LillamaError
from lillama.recipe.schema import Calibration

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which loses no character, with <s> before every text if `bos`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))


def rendered(
    rows: list[dict[str, Any]], template: str | None = None, column: str | None = None, tokenizer: Any = None
) -> list[str]:
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = template
    return list(render_rows(datasets.Dataset.from_list(rows), tokenizer, column, "calibration"))


def blocks(dataset: Any, tokenizer: Any = TOKENIZER, **options: Any) -> torch.Tensor:
    """As the text runs; what stands around every window is tested in test_special_tokens.py."""
    given = {"dataset": str(dataset), "special_tokens": "text", **options}
    return token_blocks(tokenizer, Calibration.model_validate(given))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Rendering

TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS
        ]
    },
    "orca": {"id": "7", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
    "parts": {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS]},
    "lists": {
        "prompt": [{"role": role, "content": text} for role, text in TURNS[:2]],
        "completion": [{"role": "assistant", "content": "Hello"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_of_every_form_go_through_the_template(form: str) -> None:
    row = FORMS[form]
    assert rendered([row], CHAT) == ["<s>[system]Be brief.[user]Hi[assistant]Hello</s>"]
    assert rendered([row], STRICT) == ["[user]Be brief.\n\nHi[assistant]Hello"]
    assert rendered([row]) == ["Be brief.\n\nHi\n\nHello"]


def test_instructions_and_texts() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    assert rendered(rows) == ["Add.\n\n1 and 2\n\n3", "Sing.\n\nLa"]
    assert rendered(rows, CHAT)[0] == "<s>[user]Add.\n\n1 and 2[assistant]3</s>"
    assert rendered([{"prompt": "a", "completion": "b"}]) == ["a\n\nb"]
    assert rendered([{"text": "plain", "messages": "x"}, {"text": None, "messages": "y"}], CHAT) == [
        "plain",
        "",
    ]
    assert rendered([{"text": "a", "body": "b"}], column="body") == ["b"]


def test_a_template_that_refuses_even_alternating_turns_is_not_used() -> None:
    turns = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]
    assert rendered([{"messages": turns}], STRICT) == ["Hello\n\nHi"]
    twice = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}]
    assert rendered([{"messages": twice}], STRICT) == ["[user]Hi\n\nthere"]


def test_columns_that_do_not_fit_are_named() -> None:
    with pytest.raises(LillamaError, match=r"a, b.*\n.*calibration.column"):
        rendered([{"a": 1, "b": 2}])
    with pytest.raises(LillamaError, match=r"no column 'body'.*\n.*text, title"):
        rendered([{"text": "x", "title": "y"}], column="body")
    with pytest.raises(LillamaError, match="'text' holds int"):
        rendered([{"text": 1}])


# Blocks


def test_rows_become_blocks_with_one_begin_and_one_end_each(tmp_path: Path) -> None:
    texts = ["the fox", "", "over the dog"]
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    ids = blocks(path, sequence_length=2).flatten().tolist()
    text = TOKENIZER.decode(ids)
    either = ("<s>the fox</s><s>over the dog</s>", "<s>over the dog</s><s>the fox</s>")
    assert any(whole.startswith(text) for whole in either) and "</s><s>" in text

    chat = byte_tokenizer()
    chat.chat_template = CHAT
    path = write_rows(tmp_path / "b.jsonl", [FORMS["orca"]] * 2)
    one = chat("<s>[system]Be brief.[user]Hi[assistant]Hello</s>", add_special_tokens=False)["input_ids"]
    assert blocks(path, chat, sequence_length=2 * len(one)).tolist() == [one + one]


def test_an_end_that_the_template_wrote_is_not_repeated(tmp_path: Path) -> None:
    chat = byte_tokenizer()
    chat.chat_template = CHAT + "\n\n"
    path = write_rows(tmp_path / "a.jsonl", [FORMS["orca"]])
    text = "<s>[system]Be brief.[user]Hi[assistant]Hello</s>"
    (line,) = rendered([FORMS["orca"]], chat.chat_template)
    assert line.startswith(text) and line != text, "a template that ends in a line end"
    ids = chat(line, add_special_tokens=False)["input_ids"]
    assert blocks(path, chat, sequence_length=len(ids)).tolist() == [ids]
    with pytest.raises(LillamaError, match=f"has {len(ids)} tokens"):
        blocks(path, chat, sequence_length=len(ids) + 1)


def test_a_tokenizer_without_special_tokens_only_joins(tmp_path: Path) -> None:
    bare = byte_tokenizer(bos=False)
    bare.bos_token = bare.eos_token = None
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the fox"}])
    ids = bare("the fox")["input_ids"]
    assert blocks(path, bare, sequence_length=len(ids)).tolist() == [ids]


def test_order_and_share_of_rows_follow_seed_and_fraction(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i:03}"} for i in range(200)])
    whole = blocks(path, sequence_length=4)
    assert whole.dtype == torch.int64
    assert torch.equal(whole, blocks(path, sequence_length=4))
    assert not torch.equal(whole, blocks(path, sequence_length=4, seed=1))
    text = TOKENIZER.decode(blocks(path, sequence_length=4, fraction=0.25).flatten())
    kept = [row.split("</s>")[0] for row in text.split("<s>")[1:]]
    assert len(kept) == 50 and len(set(kept)) == 50 and kept != sorted(kept)
    assert all(
        int(row[4:7]) < 100
        for row in TOKENIZER.decode(blocks(path, sequence_length=4, split="train[:50%]", fraction=0.5).flatten())
        .replace("</s>", "")
        .split("<s>")[1:-1]
    )


def test_rows_of_one_language_are_kept_and_no_more_than_asked_for(tmp_path: Path) -> None:
    rows = [{"inputs": f"in {i:03}", "targets": f"out {i:03}", "language": ("hau", "swa")[i % 2]} for i in range(200)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    text = TOKENIZER.decode(blocks(path, sequence_length=4, filter={"language": "hau"}, rows=30).flatten())
    kept = [row.split("</s>")[0] for row in text.split("<s>")[1:]]
    assert len(set(kept)) == len(kept) == 30
    assert all(int(row[3:6]) % 2 == 0 and row[3:6] in row.partition("out")[2] for row in kept[:-1])
    both = blocks(path, sequence_length=4, filter={"language": ["hau", "swa"]})
    assert torch.equal(both, blocks(path, sequence_length=4))
    with pytest.raises(LillamaError, match="no row has yor in the column 'language'") as caught:
        blocks(path, filter={"language": "yor"})
    assert caught.value.where == "calibration.filter" and "hau, swa" in str(caught.value)
    with pytest.raises(LillamaError, match="no column 'lang'"):
        blocks(path, filter={"lang": "hau"})


@pytest.mark.parametrize("wanted", [1, 30, 1000])
def test_rows_of_a_text_file_are_its_lines(tmp_path: Path, wanted: int) -> None:
    lines = [f"line {i:04} of a long story" if i % 4 else "" for i in range(400)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    text = TOKENIZER.decode(blocks(path, sequence_length=2, rows=wanted).flatten())
    assert text.count("line ") == min(wanted, 300)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the quick brown fox"}] * 1000)
    seen: list[int] = []
    calibration = Calibration.model_validate({"dataset": str(path), "tokens": 50, "sequence_length": 8})
    assert token_blocks(TOKENIZER, calibration, progress=seen.append).shape == (6, 8)
    assert seen == [50], "one call of the tokenizer was enough"
    assert len(blocks(path, tokens=10**9, sequence_length=8)) > 100, "fewer than asked for is fine"


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the fox"}])
    count = len(TOKENIZER("the fox")["input_ids"]) + 1
    with pytest.raises(LillamaError, match=f"has {count} tokens, fewer than one sequence of 512"):
        blocks(path)
    with pytest.raises(LillamaError, match="100 tokens are fewer") as caught:
        blocks(path, tokens=100)
    assert caught.value.where == "calibration.tokens"


def test_a_text_file_is_shuffled_by_chunks_of_whole_lines(tmp_path: Path) -> None:
    lines = [f"line {i:04} of a long story" if i % 4 else "" for i in range(400)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    text = TOKENIZER.decode(blocks(path, sequence_length=16, column="ignored").flatten())
    pieces = [piece.removesuffix("</s>") for piece in text.split("<s>")[1:]]
    story = path.read_text() + "\n"
    assert len(pieces) > 10 and all(piece in story for piece in pieces)
    assert all(piece.count("\n") > 1 for piece in pieces[:-1]), "running text, not single lines"
    places = [story.index(piece) for piece in pieces[:-1]]
    assert places != sorted(places)


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=30)), st.integers(1, 60))
def test_chunks_join_back_and_stay_near_their_length(lines: list[str], size: int) -> None:
    pieces = list(chunks(lines, size))
    assert "".join(pieces) == "".join(f"{line}\n" for line in lines)
    assert all(pieces) and all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) < 2 * size + 31 for piece in pieces)
    assert all(len(piece) >= size for piece in pieces[:-1])


TEXTS = st.lists(st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=40), max_size=8)


@settings(max_examples=40)
@given(TEXTS, st.integers(2, 9), st.none() | st.integers(9, 60))
def test_joining_and_cutting_lose_nothing_but_the_tail(texts: list[str], length: int, most: int | None) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a row that alone fills one block", *texts]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lillama.data.stream.load_rows", lambda *_, **__: rows)
        result = blocks("any", sequence_length=length, tokens=most).flatten().tolist()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    wanted: list[int] = []
    for i in order:
        if rows[i]["text"].strip():
            wanted += [*TOKENIZER(rows[i]["text"])["input_ids"], TOKENIZER.eos_token_id]
    end = len(wanted) if most is None else min(len(wanted), most)
    assert result == wanted[: end - end % length]


def test_the_text_that_comes_with_python_works() -> None:
    result = blocks("package:pydoc_data.topics", split="train[:80%]", tokens=4096, sequence_length=128)
    assert result.shape == (32, 128)
    assert len(set(result.flatten().tolist())) > 50


def test_batches_keep_every_block_and_their_fingerprint_notices_any_change() -> None:
    whole = torch.arange(35).view(7, 5)
    batches = text_batches(whole, 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), whole)
    prints = {
        fingerprint(batches),
        fingerprint(text_batches(whole + 1, 3)),
        fingerprint(text_batches(whole, 4)),
        fingerprint(text_batches(whole.int(), 3)),
        fingerprint([{"labels": batch["input_ids"]} for batch in batches]),
        fingerprint([{**batch, "loss_mask": torch.ones(2, dtype=torch.bfloat16)} for batch in batches]),
    }
    assert len(prints) == 6
    assert fingerprint(batches) == fingerprint(text_batches(whole.T.contiguous().T, 3))


def test_reading_modules_costs_nothing_before_it_is_used() -> None:
    code = (
        "import sys, lillama.data.rows, lillama.registry as r; [r.EVALUATORS.options(n) for n in r.EVALUATORS];"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
