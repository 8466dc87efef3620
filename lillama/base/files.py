"""Files that appear whole or not at all: each is written beside itself, flushed to disk and renamed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from torch import Tensor

    from lillama.base.tensorfile import Entry


def sync_directory(path: Path) -> None:
    """Have the names in a directory on disk."""
    with contextlib.suppress(OSError):  # not every file system lets a directory be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # a link that somebody put there would be written through
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(directory: Path) -> None:
    """Have the files below a directory on disk."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """The same for a directory, which must not exist yet. What a process that was killed left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not _is_running(old.name.split(".")[-3]):
            shutil.rmtree(old, ignore_errors=True)
    prefix = f".{path.name}.{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=path.parent))
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process of this number runs here; what is no number is left alone."""
    return not process.isdecimal() or psutil.pid_exists(int(process))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, indented for people; an infinite number becomes the largest there is."""
    write_text(path, json.dumps(without_infinities(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_checked(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that carries a hash of what it says, for `read_checked`."""
    write_json(path, {**data, "check": checksum(data)})


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote. Raises ValueError where the content does not fit its hash, or is none; OSError."""
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict) or data.pop("check", None) != checksum(data):
        raise ValueError("its content does not fit its hash")
    return data


def checksum(data: Any) -> str:
    """The sha256 of what JSON would say of `data`."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def without_infinities(data: Any) -> Any:
    """JSON knows no infinity (a perplexity may be) and no NaN (null then)."""
    if isinstance(data, dict):
        return {key: without_infinities(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_infinities(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None if math.isnan(data) else math.copysign(sys.float_info.max, data)
    return data


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from lillama.base import tensorfile

    write_entries(path, [tensorfile.Entry.of(*item) for item in tensors.items()], metadata)


def write_entries(path: Path, entries: list[Entry], metadata: dict[str, str] | None = None) -> None:
    """The same of tensors that are read when their turn comes."""
    from lillama.base import tensorfile

    with atomic_file(path) as temporary:
        tensorfile.write(temporary, entries, metadata)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def end_last_line(path: Path) -> None:
    """End the line that a killed process was writing to a file of lines, or the next one would be lost with it."""
    if path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        with path.open("a", encoding="utf-8") as handle:
            handle.write("\n")
