"""The run directory: files appear whole or not at all, and a run continues where it stopped.

Every file is written beside itself, flushed to disk and renamed. `MANIFEST.json` (sha256 of every finished
file, and the fingerprint of the run) is written after what it names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from torch import Tensor

    from lillama.base.tensorfile import Entry

MANIFEST = "MANIFEST.json"


def _sync_directory(path: Path) -> None:
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
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """The same for a directory, which must not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        temporary.rename(path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, indented for people; an infinite number becomes the largest there is."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    """JSON knows no infinity (a perplexity may be) and no NaN (null then)."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
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


class RunDirectory:
    """Everything a run leaves, and the memory that lets the same command continue it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: dict[str, Any] = {"version": 1, "fingerprint": {}, "files": {}}
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []  # of events

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Start a run here, or continue the one whose fingerprint is the same.

        Raises LillamaError, writing nothing, when the directory holds another run (the differences are
        named) or files that are not a run's.
        """
        manifest = self.path / MANIFEST
        if manifest.exists():
            try:
                self._manifest = json.loads(manifest.read_text())
                held = self._manifest["fingerprint"]
            except (ValueError, KeyError) as error:
                raise LillamaError(
                    "the manifest is damaged", where=str(manifest), hint="Use another run.out."
                ) from error
            if differences := _differences(held, fingerprint):
                raise LillamaError(
                    "the directory holds another run, which differs in\n    " + "\n    ".join(differences),
                    where=str(self.path),
                    hint="Give another run.out, or --restart to discard the run that is there.",
                )
            self._drop_damaged()
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise LillamaError(
                "this is not an empty directory, and not a run's",
                where=str(self.path),
                hint="Give another run.out.",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._manifest["fingerprint"] = fingerprint
        self._write()

    def discard(self) -> None:
        """Remove the run that is here; refuses anything that is not a run directory."""
        if not self.path.exists():
            return
        if not (self.path / MANIFEST).exists() and any(self.path.iterdir()):
            raise LillamaError("this is not a run directory", where=str(self.path), hint="Remove it yourself.")
        shutil.rmtree(self.path)

    def _drop_damaged(self) -> None:
        files = self._manifest["files"]
        for name, digest in list(files.items()):
            path = self.path / name
            if not path.exists() or sha256(path) != digest:
                del files[name]
        self._write()

    def _write(self) -> None:
        write_json(self.path / MANIFEST, self._manifest)

    def has(self, name: str) -> bool:
        """Whether the file was finished and is unharmed."""
        return name in self._manifest["files"]

    def record(self, *names: str) -> None:
        """Take finished files into the manifest."""
        for name in names:
            self._manifest["files"][name] = sha256(self.path / name)
        self._write()

    def forget(self, *names: str) -> None:
        """Take files out of the manifest and remove them."""
        for name in names:
            self._manifest["files"].pop(name, None)
        self._write()
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def put_json(self, name: str, data: Any) -> None:
        """Write and record a JSON file."""
        write_json(self.path / name, data)
        self.record(name)

    def put_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write and record a safetensors file."""
        write_tensors(self.path / name, tensors, metadata)
        self.record(name)

    def put_entries(self, name: str, entries: list[Entry]) -> None:
        """Write and record a safetensors file of tensors that are read when their turn comes."""
        write_entries(self.path / name, entries)
        self.record(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a recorded safetensors file, into memory of its own."""
        from lillama.base.tensorfile import TensorFile

        file = TensorFile(self.path / name)
        return {key: file.read(key) for key in file}

    def json(self, name: str) -> Any:
        """Read a recorded JSON file."""
        return json.loads((self.path / name).read_text())

    def event(self, kind: str, **data: Any) -> None:
        """Append one line to events.jsonl: what happened, when, with which numbers."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(_finite({"time": round(time.time(), 3), "event": kind, **data})) + "\n")
        for listen in list(self.listeners):
            listen(kind, data)


def _differences(held: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key in sorted(held.keys() | new.keys()):
        a, b = held.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {json.dumps(a)} there, {json.dumps(b)} here")
    return out
