"""The manifest that a checkpoint carries: hash and size of each of its files."""

from __future__ import annotations

import json
from pathlib import Path

from lillama.base.files import sha256, write_json

NAME = "lillama.manifest.json"


def seal(directory: Path) -> None:
    """Write the manifest of all files in `directory`."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != NAME]
    entries = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}
    write_json(directory / NAME, {"version": 1, "files": entries})


def damaged(directory: Path) -> list[str] | None:
    """What is not as it was sealed; None without a manifest."""
    try:
        files = json.loads((directory / NAME).read_bytes())["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError):
        return [NAME]
    return [n for n, e in files.items() if not (directory / n).is_file() or sha256(directory / n) != e["sha256"]]
