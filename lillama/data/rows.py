"""Rows of text from anywhere: files, folders, installed packages, the hub; and their rendering as text.

Everything is read with the `datasets` library, so that all sources slice, shuffle and cache alike.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE = "package:"
KINDS = {".txt": "text", ".raw": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLIT_PART = re.compile(r"\s*([\w.-]+)\s*((?:\[[^\]]*\])?(?:\(\w+\))?)\s*")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")


def load_rows(dataset: str, *, config: str | None = None, split: str, where: str) -> Dataset:
    """The rows of `split` (slices and sums allowed: train[:80%], train[:10]+train[50:60]) of a data set.

    `dataset` is a .txt or .raw (a row per line, blank ones kept), .jsonl, .json, .parquet or .csv file (.gz too), a
    folder of files of one kind, `package:MODULE` (the texts of a module, ordered by key), or a hub id. A
    local file is one split whatever it is called; a folder whose files are named after several splits has
    those; `config` is a sub-folder there if one is called so, else nothing. A changed file is read again.
    `where` is the recipe's section. Raises LillamaError at WHERE.dataset, WHERE.split or WHERE.config.
    """
    with _quiet():
        if dataset.startswith(PACKAGE):
            everything = _package_rows(dataset.removeprefix(PACKAGE), where)
            rows = _local_rows(split, lambda name: dataset, lambda source: everything, where)
        elif path := _local_path(dataset):
            files = _files(path, config, where)
            rows = _local_rows(split, lambda name: _of_split(path, files, name, where), _reader(where), where)
        else:
            rows = _hub_rows(dataset, config, split, where)
    if not len(rows):
        raise LillamaError(f"'{split}' of '{dataset}' has no rows", where=f"{where}.split", hint="Take a larger slice.")
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


def _kind(path: PurePath) -> str | None:
    return KINDS.get(PurePath(path.name.lower().removesuffix(".gz")).suffix)


def _local_path(dataset: str) -> Path | None:
    """The path if `dataset` is one; a hub id never starts with . / or ~ nor ends like a data file."""
    path = Path(dataset).expanduser()
    return path if path.exists() or dataset.startswith((".", "/", "~")) or _kind(path) else None


def _files(path: Path, config: str | None, where: str) -> tuple[Path, ...]:
    """The data files at `path`, all of one kind."""
    known = f"Known: {', '.join(KINDS)} (and .gz), or a folder of files of one of these."
    where = f"{where}.dataset"
    if path.is_file():
        if _kind(path) is None:
            raise LillamaError(f"'{path}' is no kind of file that can be read", where=where, hint=known)
        return (path,)
    if not path.is_dir():
        raise LillamaError(f"there is no file '{path}'", where=where, hint="Check the path.")
    if config and (path / config).is_dir():
        path = path / config
    found = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path)) and _kind(f))
    if path / "manifest.jsonl" in found:  # an audio folder: the manifest holds the rows
        return (path / "manifest.jsonl",)
    kinds = sorted({str(_kind(f)) for f in found})
    if len(kinds) > 1:
        raise LillamaError(
            f"the folder '{path}' holds files of several kinds ({', '.join(kinds)})",
            where=where,
            hint="Name one file, or keep one kind in the folder.",
        )
    if not found:
        raise LillamaError(f"the folder '{path}' holds no file that can be read", where=where, hint=known)
    return tuple(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_split(path: Path, files: tuple[Path, ...], name: str, where: str) -> tuple[Path, ...]:
    """The files of the split `name`, where file or folder names tell several splits apart; else all."""
    splits: dict[str, list[Path]] = {}
    for file in files if path.is_dir() else ():
        for part in reversed(file.relative_to(path).parts):
            if word := _SPLIT_WORD.search(part.lower()):
                splits.setdefault(_SPLITS[word[1]], []).append(file)
                break
    if len(splits) < 2 or name == "all":
        return files
    wanted = name.partition(".")[0]
    wanted = _SPLITS.get(wanted, wanted)
    if wanted not in splits:
        raise LillamaError(
            f"the folder '{path}' has no split '{name}'",
            where=f"{where}.split",
            hint=f"Known: {', '.join(sorted(splits))}, all.",
        )
    return tuple(splits[wanted])


def _reader(where: str) -> Callable[[Any], Dataset]:
    """Reads files of one kind; content, not time stamps, decides whether the cache is still good."""

    def read(files: tuple[Path, ...]) -> Dataset:
        import datasets

        empty = LillamaError(f"'{files[0]}' is empty", where=f"{where}.dataset", hint="Give a file with text.")
        kind = str(_kind(files[0]))
        try:
            if not any(file.stat().st_size for file in files):
                raise empty
            digest = hashlib.sha256()
            for file in files:
                with file.open("rb") as stream:
                    while piece := stream.read(1 << 20):
                        digest.update(piece)
            names = [glob.escape(str(file.resolve())) for file in files]
            # Not load_dataset, which reports every use to the hub: here nothing leaves the machine. And datasets
            # recognises a changed file by its time of change alone, which copying tools preserve.
            return getattr(datasets.Dataset, f"from_{kind}")(names, config_name=digest.hexdigest()[:16])
        except LillamaError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            if type(cause).__name__ in {"SchemaInferenceError", "StopIteration", "EmptyDataError"}:
                raise empty from error
            raise LillamaError(
                f"'{files[0]}' cannot be read as {kind}: {_first_line(cause)}",
                where=f"{where}.dataset",
                hint="Mend the file, or give another.",
            ) from error

    return read


def _local_rows(
    split: str, source_of: Callable[[str], Hashable], read: Callable[[Any], Dataset], where: str
) -> Dataset:
    """The parts of `split` (NAME[SLICE]+NAME[SLICE]) one after the other, equal parts once."""
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
            raise LillamaError(f"{bad}: {_first_line(error)}", where=f"{where}.split", hint=hint) from error
        wanted = range(cuts[0].from_, cuts[0].to)
        parts[source, match[2]] = rows.select(wanted if wanted else [])  # an empty range may lie outside
    several = list(parts.values())
    return several[0] if len(several) == 1 else datasets.concatenate_datasets(several)


def _package_rows(module: str, where: str) -> Dataset:
    """The largest dict[str, str] or list[str] of an installed module, dicts ordered by key."""
    import datasets

    where = f"{where}.dataset"
    try:
        names = vars(importlib.import_module(module))
    except Exception as error:  # a module may raise anything while it is imported
        raise LillamaError(
            f"the module '{module}' cannot be imported: {_first_line(error)}",
            where=where,
            hint="Install the package it comes with, or check the name.",
        ) from error
    candidates = []
    for name in sorted(names):
        value = names[name]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            value = [value[key] for key in sorted(value)]
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            candidates.append(value)
    if not candidates:
        raise LillamaError(
            f"the module '{module}' has no dict[str, str] or list[str] of texts",
            where=where,
            hint="package:pydoc_data.topics is one that has.",
        )
    texts = max(candidates, key=lambda texts: sum(map(len, texts)))
    return datasets.Dataset.from_dict({"text": texts}, info=datasets.DatasetInfo(builder_name="package"))


def _hub_rows(dataset: str, config: str | None, split: str, where: str) -> Dataset:
    import datasets

    local = f"Give a local file instead: --set {where}.dataset=FILE."
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise LillamaError(
            f"the hub has no data set '{dataset}' that you may read ({_first_line(error)})",
            where=f"{where}.dataset",
            hint=f"Check the name, log in if it is private or gated. {local}",
        ) from error
    except Exception as error:
        message, key, hint = _first_line(error), "dataset", local
        unreachable = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
            ("httpx", "requests")
        )
        if unreachable:
            what = f"the hub is not reachable, so '{dataset}' cannot be read: {message}"
        elif isinstance(error, RuntimeError) and "scripts" in str(error):
            what = f"'{dataset}' is a script, which datasets {datasets.__version__} does not run"
        else:
            what = f"'{dataset}' cannot be read: {message}"
            available = re.search(r"\[[^\[\]]*\]", str(error))
            if isinstance(error, ValueError) and re.search(r"[Ss]plit|[Cc]onfig", message):
                key = "split" if re.search(r"[Ss]plit", message) else "config"
                hint = f"Available: {available[0][1:-1]}." if available else hint
        raise LillamaError(what, where=f"{where}.{key}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
