"""Rows of a data set as text: plain columns, conversations through the chat template, prompts and answers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset


_TEXT = ("text", "content")


_CHAT = ("conversations", "messages")


_PAIRS = (
    ("instruction", ("output", "response")),
    ("prompt", ("completion", "response")),
    ("question", ("answer", "response")),
    ("inputs", ("targets",)),
)


_ROLES = {"human": "user", "gpt": "assistant"}


Turns = list[dict[str, str]]


def render_rows(rows: Dataset, tokenizer: Any, column: str | None, where: str) -> Iterator[str]:
    """The text of every row, "" where there is none, in the order of the rows.

    Read are: `column` if given; else text or content; conversations (ShareGPT) or messages; instruction
    [input, context], output; prompt, completion; question, answer [system_prompt]; inputs, targets. All but plain
    text go through the tokenizer's chat template, with the system's text in the first user turn where the template
    refuses it, or are joined by blank lines where there is none. A .txt file and a package have no columns,
    so `column` does not apply. Raises LillamaError at WHERE.column that lists the columns there are.
    """
    columns, value = _columns(rows, column, where)
    return (_render(value(row), tokenizer) for row in rows.select_columns(columns))


def _columns(rows: Dataset, column: str | None, where: str) -> tuple[list[str], Callable[[Any], str | Turns]]:
    """The columns to read, and what makes a text or turns of them."""
    where = f"{where}.column"
    present = rows.column_names
    if rows.info.builder_name in {"text", "package"}:
        column = None
    if column is not None and column not in present:
        raise LillamaError(
            f"there is no column '{column}'", where=where, hint=f"The columns are: {', '.join(present)}."
        )
    single = column or next((name for name in (*_TEXT, *_CHAT) if name in present), None)
    if single:
        return [single], lambda row: _value(row[single], single, where)
    for prompt, answers in _PAIRS:
        answer = next((name for name in answers if name in present), None)
        if prompt in present and answer:
            system = [name for name in ("system_prompt", "system") if name in present][:1]
            context = [name for name in ("input", "context") if name in present and prompt == "instruction"][:1]
            parts = [("system", system), ("user", [prompt, *context]), ("assistant", [answer])]
            names = [name for _, several in parts for name in several]
            return names, functools.partial(_pair, parts=parts, where=where)
    raise LillamaError(
        f"none of the columns ({', '.join(present)}) is known to hold text",
        where=where,
        hint=f"Set {where} to the one that does.",
    )


def _value(value: Any, name: str, where: str) -> str | Turns:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):  # the older form of a list of dicts: a dict of lists
        value = [dict(zip(value, entry)) for entry in zip(*value.values())]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return [_turn(turn) for turn in value]
    raise LillamaError(
        f"the column '{name}' holds {type(value).__name__}, neither text nor turns of a conversation",
        where=where,
        hint="Set it to a column of text.",
    )


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    role = str(turn.get("role") or turn.get("from") or "user").lower()
    content = turn.get("content") if "content" in turn else turn.get("value")
    if isinstance(content, list):  # parts, of which images and the like say nothing here
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return {"role": _ROLES.get(role, role), "content": str(content or "")}


def _pair(row: dict[str, Any], parts: list[tuple[str, list[str]]], where: str) -> Turns:
    turns: Turns = []
    for role, names in parts:
        values = [_value(row[name], name, where) for name in names]
        for value in values:
            if not isinstance(value, str):  # prompts and completions may be conversations themselves
                turns += value
        text = "\n\n".join(value for value in values if value and isinstance(value, str))
        turns.append({"role": role, "content": text})
    return turns


def _render(value: str | Turns, tokenizer: Any) -> str:
    if isinstance(value, str):
        return value
    turns = [turn for turn in value if turn["content"].strip()]
    if turns and getattr(tokenizer, "chat_template", None):
        for attempt in (turns, _alternating(turns)):
            # A template refuses what it cannot express by raising whatever its author chose.
            with contextlib.suppress(Exception):
                return str(tokenizer.apply_chat_template(attempt, tokenize=False))
    return "\n\n".join(turn["content"] for turn in turns)


def _alternating(turns: Turns) -> Turns:
    """User and assistant in turn: the system's text goes to the user, neighbours of one role are joined."""
    result: Turns = []
    for turn in turns:
        role = "user" if turn["role"] == "system" else turn["role"]
        if result and result[-1]["role"] == role:
            result[-1] = {"role": role, "content": f"{result[-1]['content']}\n\n{turn['content']}"}
        else:
            result.append({"role": role, "content": turn["content"]})
    return result
