"""The run directory: files appear whole or not at all, and a run continues where it stopped.

Every file is written beside itself, flushed to disk and renamed. `MANIFEST.json` (sha256 of every finished
file, and the fingerprint of the run) is written after what it names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lillama.base.files import sha256, without_infinities, write_entries, write_json, write_tensors
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from torch import Tensor

    from lillama.base.tensorfile import Entry

MANIFEST = "MANIFEST.json"
MODEL = "model"  # the checkpoint
FINETUNED = "finetuned"  # the checkpoint after fine-tuning
CHECKPOINTS = (MODEL, FINETUNED)
RESOLVED = "recipe.resolved.yaml"
LOCK = ".lock"
OWNER = ".owner"  # who has the lock, for people


class RunDirectory:
    """Everything a run leaves, and the memory that lets the same command continue it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: dict[str, Any] = {"version": 1, "fingerprint": {}, "files": {}}
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []  # of events
        self._lock = FileLock(path / LOCK, timeout=0)

    def open(self, fingerprint: dict[str, Any], restart: bool = False) -> None:
        """Start a run here, or continue the one whose fingerprint is the same; `restart` discards the one that is here.

        The directory is this process' own until `close`. Raises LillamaError, writing nothing, when the directory holds
        another run (the differences are named) or files that are not a run's, and when another process works here.
        """
        if restart:
            self._discard()
        self._check(fingerprint)
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._check(fingerprint)  # again: another process may have begun a run meanwhile
        except LillamaError:
            self.close()
            raise
        if (self.path / MANIFEST).exists():
            self._drop_damaged()
            return
        self._manifest = {"version": 1, "fingerprint": fingerprint, "files": {}}
        self._write()

    def close(self) -> None:
        """Let other processes work here."""
        self._lock.release(force=True)

    def _acquire(self) -> None:
        """Take the lock, and leave a word on who has it. It is the system's: a process that dies gives it back."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout as error:
            said = ""
            with contextlib.suppress(OSError):
                said = (self.path / OWNER).read_text(encoding="utf-8").strip()
            who = f" (it is {said})" if said else ""
            raise LillamaError(
                f"another process works in this run directory{who}",
                where=str(self.path),
                hint="Wait until it is done, stop it, or give another run.out.",
            ) from error
        (self.path / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def _check(self, fingerprint: dict[str, Any]) -> None:
        """LillamaError unless a run with this fingerprint may go on, or begin, here; reads the manifest there is."""
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
            return
        if self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise LillamaError(
                "this is not an empty directory, and not a run's",
                where=str(self.path),
                hint="Give another run.out.",
            )

    def _is_empty(self) -> bool:
        """Whether nothing but an old lock is here."""
        return {path.name for path in self.path.iterdir()} <= {LOCK, OWNER}

    def _discard(self) -> None:
        """Remove the run that is here; refuses anything that is not a run directory."""
        if not self.path.exists():
            return
        if not (self.path / MANIFEST).exists():
            if not self._is_empty():
                raise LillamaError("this is not a run directory", where=str(self.path), hint="Remove it yourself.")
            return
        self._acquire()
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK, OWNER):
                path.unlink()

    def _drop_damaged(self) -> None:
        """Forget what is not as it was written. A checkpoint is one unit: with one file of it, all of it goes."""
        files = self._manifest["files"]
        damaged = {
            name
            for name, digest in files.items()
            if not (self.path / name).is_file() or sha256(self.path / name) != digest
        }
        units = {f"{unit}/" for unit in CHECKPOINTS if any(name.startswith(f"{unit}/") for name in damaged)}
        self._manifest["files"] = {
            name: digest for name, digest in files.items() if name not in damaged and not name.startswith(tuple(units))
        }
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

    def put_tensor_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Write several safetensors files and record them at once: a process that is killed leaves all or none."""
        for name, tensors in files.items():
            write_tensors(self.path / name, tensors)
        self.record(*files)

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
            handle.write(json.dumps(without_infinities({"time": round(time.time(), 3), "event": kind, **data})) + "\n")
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
