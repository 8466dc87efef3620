"""The memory of a run directory: which files are finished, with their hashes, and of which run they are.

`MANIFEST.json` is written after what it names, and has a copy beside it: it carries a hash of its own, so a damaged one
is noticed and the copy takes its place. A file of that name that is not ours is never taken for one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lillama.base.files import checksum, write_checked
from lillama.errors import LillamaError

NAME = "MANIFEST.json"
COPY = ".MANIFEST.copy.json"
VERSION = 1
# What a run leaves besides, without hashes: it grows, is made anew at any time, or is work in progress.
ALSO = ("bench.json", "events.jsonl", "finetune", "report.html", "streams")


@dataclass
class Manifest:
    """The `fingerprint` of a run, the sha256 of its finished `files` by name, and what `also` is the run's."""

    fingerprint: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ALSO

    def write(self, directory: Path) -> None:
        """Write the manifest and its copy, the one after the other, so that one of them is always whole."""
        data = {"version": VERSION, "fingerprint": self.fingerprint, "files": self.files, "also": list(self.also)}
        for name in (NAME, COPY):
            write_checked(directory / name, data)


def is_there(directory: Path) -> bool:
    """Whether a directory has a manifest, of whatever kind."""
    return (directory / NAME).exists() or (directory / COPY).exists()


def read(directory: Path) -> Manifest:
    """The manifest of a run directory, or its copy where that one is damaged or gone.

    Raises LillamaError where neither is a run's.
    """
    reasons = []
    for name in (NAME, COPY):
        try:
            return _parse((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reasons.append(f"{name}: {error}")
    raise LillamaError(
        f"the manifest is damaged, or not that of a run ({reasons[0] if reasons else 'there is none'})",
        where=str(directory / NAME),
        hint="Give another run.out; if this was a run of yours, its layers/ and model/ are still there.",
    )


def _parse(text: bytes) -> Manifest:
    """The manifest that a file holds. Raises ValueError with the reason where it is none."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ValueError("it is not of the format that runs have")
    fingerprint, files, also = data.get("fingerprint"), data.get("files"), data.get("also", list(ALSO))
    if not isinstance(fingerprint, dict) or not isinstance(files, dict) or not isinstance(also, list):
        raise ValueError("it is not of the format that runs have")
    for name in [*files, *also]:
        if not is_inside(name):
            raise ValueError(f"it names {name!r}, which is no file of the directory")
    for name, digest in files.items():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"it has no hash of {name}")
    if "check" in data and data.pop("check") != checksum(data):  # earlier versions wrote none
        raise ValueError("its content does not fit its hash")
    return Manifest(fingerprint, files, tuple(also))


def is_inside(name: Any) -> bool:
    """Whether `name` is that of a file below a directory, and of none of the directory's own bookkeeping."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name not in (".", NAME, COPY)


def differences(held: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two fingerprints, a line for each key."""
    out: list[str] = []
    for key in sorted(held.keys() | new.keys()):
        a, b = held.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {json.dumps(a)} there, {json.dumps(b)} here")
    return out
