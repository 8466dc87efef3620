"""What a checkpoint was when it was written: the size and hash of each of its files, in a file beside them.

Any damage shows (an incomplete download, a disk that forgets), and any change; a seal says nothing of who wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lillama.base.files import sha256, write_text

NAME = "lillama.manifest.json"
VERSION = 1
# What a library may read when the directory is opened: such a file that was put in later is a change as well.
READ = (".json", ".safetensors", ".bin", ".py", ".txt", ".model", ".jinja", ".tiktoken", ".pt", ".pth", ".gguf")

Files = dict[str, tuple[int, str]]  # name -> bytes, sha256


def seal(directory: Path) -> dict[str, str]:
    """Write the manifest of every file in `directory`, the manifest itself and hidden files aside; their hashes."""
    named = (f for f in directory.iterdir() if is_plain_name(f.name) and f.name != NAME and not f.name.startswith("."))
    files = {file.name: (file.stat().st_size, sha256(file)) for file in sorted(named) if file.is_file()}
    write_text(directory / NAME, _text(files))
    return {name: digest for name, (_, digest) in files.items()}


def _text(files: Files) -> str:
    """The manifest: there is one way to write it, so that a change to itself shows as well."""
    held = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return json.dumps({"version": VERSION, "files": held}, indent=2, ensure_ascii=False) + "\n"


def damaged(directory: Path, done: Callable[[int], None] | None = None) -> list[str] | None:
    """What is not as it was sealed, a line for each file; None where there is no manifest.

    Sizes come first: hashes are computed only where all of them are right. `done` hears of the bytes that were hashed.
    """
    if not _there(directory):
        return None
    files = read(directory)
    if files is None:
        return [f"{NAME}: the manifest itself is damaged"]
    known = {NAME, *files}
    extra = [f.name for f in sorted(directory.iterdir()) if f.suffix in READ and f.is_file() and f.name not in known]
    found = [*_of_another_size(directory, files), *(f"{name}: is not in the manifest" for name in extra)]
    if found:
        return found
    for name, (size, digest) in files.items():
        if sha256(directory / name) != digest:
            found.append(f"{name}: other content than was written")
        if done is not None:
            done(size)
    return found


def cut_short(directory: Path) -> list[str]:
    """The weights that are missing or of another size than was sealed: cheap, and what a broken download leaves."""
    files = read(directory) or {}
    return _of_another_size(directory, {n: held for n, held in files.items() if n.endswith(".safetensors")})


def _of_another_size(directory: Path, files: Files) -> list[str]:
    found = []
    for name, (size, _) in files.items():
        file = directory / name
        if not file.is_file():
            found.append(f"{name}: missing")
        elif (now := file.stat().st_size) != size:
            found.append(f"{name}: {now:,} bytes, not {size:,}")
    return found


def _there(directory: Path) -> bool:
    return (directory / NAME).exists() or (directory / NAME).is_symlink()


def read(directory: Path) -> Files | None:
    """The manifest of a directory; None where there is none, or it cannot be one."""
    try:
        text = (directory / NAME).read_text(encoding="utf-8")
        files = {name: (one["bytes"], one["sha256"]) for name, one in json.loads(text)["files"].items()}
        whole = bool(files) and all(is_plain_name(name) and _is_entry(*one) for name, one in files.items())
        return files if whole and text == _text(files) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_entry(size: Any, digest: Any) -> bool:
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return whole and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def is_plain_name(name: Any) -> bool:
    """Whether `name` is that of a file in a directory: it leads nowhere else, under any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")
