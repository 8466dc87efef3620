"""The run directory: files appear whole or not at all, and a run continues where it stopped.

Every file is written beside itself, flushed to disk and renamed. `MANIFEST.json` (sha256 of every finished
file, and the fingerprint of the run) is written after what it names.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.base.files import _finite, sha256, write_entries, write_json, write_tensors
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from torch import Tensor

    from lillama.base.tensorfile import Entry

MANIFEST = "MANIFEST.json"


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


MODEL = "model"  # the checkpoint in a run directory


RESOLVED = "recipe.resolved.yaml"
