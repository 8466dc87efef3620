"""Rows of benchmark files in the shape that lm-eval's tasks expect.

Each function takes the rows of a file, as on the hub or as their authors published them, and returns them as on the
hub. A task's YAML names them as `process_docs`, so they work under lm-eval's own command line too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def _each(rows: Dataset, name: str, convert: Callable[[Row], Row]) -> Dataset:
    """Every row converted; a column that is missing is an error that lists those there are."""
    from datasets import Dataset

    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(convert(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            missing = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise LillamaError(
                f"row {number} is not one of {name}: {missing}; its columns are {', '.join(row)}",
                hint="Rows are read as the hub has them, or as their authors published them.",
            ) from error
    return Dataset.from_list(found)


def arc(rows: Dataset) -> Dataset:
    """ARC: `question`, `choices` {text, label}, `answerKey`; published: `question` {stem, choices}, `answerKey`."""

    def convert(row: Row) -> Row:
        question, choices = row["question"], row.get("choices")
        if isinstance(question, Mapping):
            question, choices = question["stem"], question["choices"]
        return {"question": question, "choices": _choices(choices), "answerKey": row["answerKey"]}

    return _each(rows, "ARC", convert)


def openbookqa(rows: Dataset) -> Dataset:
    """OpenBookQA: `question_stem`, `choices`, `answerKey`; published: as ARC."""

    def convert(row: Row) -> Row:
        stem, choices = row.get("question_stem"), row.get("choices")
        if stem is None:
            stem, choices = row["question"]["stem"], row["question"]["choices"]
        return {"question_stem": stem, "choices": _choices(choices), "answerKey": row["answerKey"]}

    return _each(rows, "OpenBookQA", convert)


def _choices(choices: Any) -> Row:
    """{"text": [...], "label": [...]} of either form."""
    if isinstance(choices, Mapping):
        return {"text": list(choices["text"]), "label": list(choices["label"])}
    return {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}


def boolq(rows: Dataset) -> Dataset:
    """BoolQ: `passage`, `question`, `label`; published: `answer` true or false."""

    def convert(row: Row) -> Row:
        label = row["label"] if "label" in row else row["answer"]
        return {"passage": row["passage"], "question": row["question"], "label": int(label)}

    return _each(rows, "BoolQ", convert)


def piqa(rows: Dataset) -> Dataset:
    """PIQA: `goal`, `sol1`, `sol2`, `label` (0 or 1), which its authors publish in a file of its own."""

    def convert(row: Row) -> Row:
        return {name: row[name] for name in ("goal", "sol1", "sol2")} | {"label": int(row["label"])}

    return _each(rows, "PIQA", convert)


def social_iqa(rows: Dataset) -> Dataset:
    """Social IQa: `context`, `question`, `answerA` to `answerC`, `label` (1 to 3)."""

    def convert(row: Row) -> Row:
        names = ("context", "question", "answerA", "answerB", "answerC")
        label = str(row["label"])
        if label not in ("1", "2", "3"):
            raise ValueError(f"its label {label} is none of 1, 2, 3")
        return {name: row[name] for name in names} | {"label": label}

    return _each(rows, "Social IQa", convert)


def winogrande(rows: Dataset) -> Dataset:
    """WinoGrande: `sentence` with a gap `_`, `option1`, `option2`, `answer` (1 or 2)."""

    def convert(row: Row) -> Row:
        return {name: row[name] for name in ("sentence", "option1", "option2")} | {"answer": str(row["answer"])}

    return _each(rows, "WinoGrande", convert)


def truthfulqa(rows: Dataset) -> Dataset:
    """TruthfulQA: `question`, `mc1_targets`, `mc2_targets` {choices, labels}; published: {answer: 0 or 1}."""

    def targets(given: Row) -> Row:
        if "choices" in given and "labels" in given:
            return {"choices": list(given["choices"]), "labels": [int(label) for label in given["labels"]]}
        # Read as one table, every row has the answers of all others, with nothing in them.
        own = {answer: int(label) for answer, label in given.items() if label is not None}
        return {"choices": list(own), "labels": list(own.values())}

    def convert(row: Row) -> Row:
        mc2 = targets(row["mc2_targets"])
        mc1 = targets(row["mc1_targets"]) if row.get("mc1_targets") else mc2
        return {"question": row["question"], "mc1_targets": mc1, "mc2_targets": mc2}

    return _each(rows, "TruthfulQA", convert)


def logiqa(rows: Dataset) -> Dataset:
    """LogiQA: `label` (a to d), `context`, `question`, `options`; published: blocks of seven lines of text.

    A block is its label, passage, question and four options that begin with "A." to "D."; a blank follows every full
    stop of it, as in the hub's version.
    """

    def block(text: str) -> Row:
        lines = [line.strip() for line in text.strip().splitlines()]
        if len(lines) != 7:
            raise ValueError(f"a block has {len(lines)} lines, not 7")
        label, context, question, *options = lines
        return _logiqa(label, _spaced(context), _spaced(question), [_spaced(option[2:]) for option in options])

    if rows.column_names == ["text"]:
        return _each(rows.filter(lambda row: row["text"].strip()), "LogiQA", lambda row: block(row["text"]))
    return _each(
        rows, "LogiQA", lambda row: _logiqa(row["label"], row["context"], row["question"], list(row["options"]))
    )


def _spaced(text: str) -> str:
    return text.replace(".", ". ").strip()


def _logiqa(label: str, context: str, question: str, options: list[str]) -> Row:
    label = label.strip().lower()
    if label not in ("a", "b", "c", "d"):
        raise ValueError(f"its label '{label}' is none of a, b, c, d")
    return {"label": label, "context": context, "question": question, "options": options}


def afrimmlu(rows: Dataset) -> Dataset:
    """AfriMMLU: `subject`, `question`, `choices` (a list, or its text as on the hub), `answer` (A to D)."""

    def convert(row: Row) -> Row:
        choices = row["choices"]
        text = choices if isinstance(choices, str) else repr(list(choices))
        return {name: row[name] for name in ("subject", "question", "answer")} | {"choices": text}

    return _each(rows, "AfriMMLU", convert)
