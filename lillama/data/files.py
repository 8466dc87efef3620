"""Rows from a file of this machine, or a folder of files of one kind."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lillama.data.rows import first_line, select_split
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {".txt": "text", ".raw": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")


def read_files(dataset: str, config: str | None, split: str, where: str) -> Dataset | None:
    """The rows of `split` of a local file or folder; None for what cannot be a path. `config` is a sub-folder."""
    path = _local_path(dataset)
    if path is None:
        return None
    files = _files(path, config, where)
    return select_split(split, lambda name: _of_split(path, files, name, where), _reader(where), where)


def _kind(path: PurePath) -> str | None:
    return KINDS.get(PurePath(path.name.lower().removesuffix(".gz")).suffix)


def _local_path(dataset: str) -> Path | None:
    """The path if `dataset` is one; a hub id never starts with . / or ~ nor ends like a data file."""
    path = Path(os.path.expanduser(dataset))  # noqa: PTH111  # Path's own fails where ~NAME is nobody
    return path if _exists(path) or dataset.startswith((".", "/", "~")) or _kind(path) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be read
        return False


def missing(dataset: str) -> Path | None:
    """The path that `dataset` is, if it is one of this machine and nothing is there; no file is opened."""
    path = _local_path(dataset)
    return path if path is not None and not _exists(path) else None


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
                f"'{files[0]}' cannot be read as {kind}: {first_line(cause)}",
                where=f"{where}.dataset",
                hint="Mend the file, or give another.",
            ) from error

    return read
