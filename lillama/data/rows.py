"""Rows of a data set, from wherever its name says: the readers of READERS are asked in turn.

A reader is a function (dataset, config, split, where) -> the rows, or None for a name that is not its own. Rows are
those of the `datasets` library, so that all sources slice, shuffle and cache alike.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError
from lillama.registry import READERS

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = ("package", "files", "hub")
_SPLIT_PART = re.compile(r"\s*([\w.-]+)\s*((?:\[[^\]]*\])?(?:\(\w+\))?)\s*")


def load_rows(dataset: str, *, config: str | None = None, split: str, where: str) -> Dataset:
    """The rows of `split` (slices and sums allowed: train[:80%], train[:10]+train[50:60]) of a data set.

    `dataset` is a .txt or .raw (a row per line, blank ones kept), .jsonl, .json, .parquet or .csv file (.gz too), a
    folder of files of one kind, `package:MODULE` (the texts of a module, ordered by key), a hub id, or what a
    plugin's reader takes for its own. A local file is one split whatever it is called; a folder whose files are named
    after several splits has those; `config` is a sub-folder there if one is called so, else nothing. A changed file is
    read again.
    `where` is the recipe's section. Raises LillamaError at WHERE.dataset, WHERE.split or WHERE.config.
    """
    with _quiet():
        rows = next(found for name in _order() if (found := _asked(name, dataset, config, split, where)) is not None)
    if not len(rows):
        raise LillamaError(f"'{split}' of '{dataset}' has no rows", where=f"{where}.split", hint="Take a larger slice.")
    return rows


def _order() -> list[str]:
    """The readers in the order in which they are asked: those of plugins first, the hub, which takes any name, last."""
    return [*(name for name in READERS if name not in BUILTIN), *BUILTIN]


def _asked(reader: str, dataset: str, config: str | None, split: str, where: str) -> Dataset | None:
    try:
        rows: Dataset | None = READERS.get(reader)(dataset, config, split, where)
    except LillamaError as error:
        error.where = error.where or f"{where}.dataset"
        raise
    except Exception as error:
        raise LillamaError(
            f"the data reader '{reader}' failed on '{dataset}': {type(error).__name__}: {first_line(error)}",
            where=f"{where}.dataset",
        ) from error
    return rows


def keep_rows(rows: Dataset, wanted: Mapping[str, Any] | None, where: str) -> Dataset:
    """The rows whose columns have the `wanted` values (one, or any of a list). Raises LillamaError at WHERE.filter."""
    for column, values in (wanted or {}).items():
        if column not in rows.column_names:
            raise LillamaError(
                f"there is no column '{column}'",
                where=f"{where}.filter",
                hint=f"The columns are: {', '.join(rows.column_names)}.",
            )
        held = rows.with_format(None)[column]
        chosen = set(values if isinstance(values, list) else [values])
        kept = [i for i, value in enumerate(held) if value in chosen]
        if not kept:
            present = sorted({str(value) for value in held})
            raise LillamaError(
                f"no row has {' or '.join(map(str, sorted(chosen, key=str)))} in the column '{column}'",
                where=f"{where}.filter",
                hint=f"It holds: {', '.join(present[:20])}{' ...' if len(present) > 20 else ''}.",
            )
        rows = rows.select(kept)
    return rows


def is_lines(rows: Dataset) -> bool:
    """Whether rows are the lines of a text, which joined by line ends give the text back."""
    return rows.info.builder_name == "text"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def select_split(
    split: str, source_of: Callable[[str], Hashable], read: Callable[[Any], Dataset], where: str
) -> Dataset:
    """The parts of `split` (NAME[SLICE]+NAME[SLICE]) one after the other, equal parts once.

    `source_of` says where the split NAME is, `read` reads that as one data set. Raises LillamaError at WHERE.split.
    """
    import datasets

    parts: dict[Hashable, Dataset] = {}
    bad = f"'{split}' is not a split"
    hint = "For example train, train[:80%], train[100:200]."
    for text in split.split("+"):
        match = _SPLIT_PART.fullmatch(text)
        if not match:
            raise LillamaError(bad, where=f"{where}.split", hint=hint)
        source = source_of(match[1])
        rows = read(source)
        try:
            cuts = datasets.ReadInstruction.from_spec(f"train{match[2]}").to_absolute({"train": len(rows)})
        except (ValueError, AssertionError) as error:
            raise LillamaError(f"{bad}: {first_line(error)}", where=f"{where}.split", hint=hint) from error
        wanted = range(cuts[0].from_, cuts[0].to)
        parts[source, match[2]] = rows.select(wanted if wanted else [])  # an empty range may lie outside
    several = list(parts.values())
    return several[0] if len(several) == 1 else datasets.concatenate_datasets(several)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
