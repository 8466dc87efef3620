"""`lillama verify`: is every file of a run or a checkpoint what was written?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from lillama.base import manifest
from lillama.base.files import sha256
from lillama.base.progress import Progress
from lillama.checkpoint import seal
from lillama.errors import LillamaError

LARGE = 1 << 30  # bytes from which a bar is shown
MEGABYTE = 1 << 20

Check = Callable[[Callable[[int], None]], list[str]]


def verify(directory: Path, progress: Progress) -> int:
    """Print what is damaged or missing and return 1, or one line and return 0. LillamaError where there is nothing."""
    if manifest.is_there(directory):
        return _run(directory, progress)
    if (directory / seal.NAME).exists():
        return _sealed(directory, progress)
    if (directory / "config.json").is_file():
        return _unsealed(directory)
    hint = "Give the run.out of a recipe, or a directory with config.json and weights."
    raise LillamaError("this is neither a run directory nor a checkpoint", where=str(directory), hint=hint)


def _run(directory: Path, progress: Progress) -> int:
    files = manifest.read(directory).files
    troubles, there = [], {}
    for name, digest in files.items():
        file = directory / name
        if not _inside(file, directory):
            troubles.append(f"{name}: is not a file in this directory")
        elif not file.is_file():
            troubles.append(f"{name}: missing")
        else:
            there[name] = digest

    def check(done: Callable[[int], None]) -> list[str]:
        found = []
        for name, digest in there.items():
            if sha256(directory / name) != digest:
                found.append(f"{name}: other content than was written")
            done((directory / name).stat().st_size)
        return found

    total = sum((directory / name).stat().st_size for name in there)
    return _said(directory, [*troubles, *_with_bar(check, total, progress)], len(files), total)


def _inside(file: Path, directory: Path) -> bool:
    """Whether `file` is in `directory`, links followed; of names alone the manifest has seen to that."""
    try:
        return file.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _sealed(directory: Path, progress: Progress) -> int:
    files = seal.read(directory) or {}
    total = sum(size for size, _ in files.values())
    found = _with_bar(lambda done: seal.damaged(directory, done) or [], total, progress)
    return _said(directory, found, len(files), total)


def _unsealed(directory: Path) -> int:
    from lillama.checkpoint import fits

    sys.stdout.write(f"{directory}: there is no {seal.NAME}, so no hash is known\n")
    try:
        left = fits.check(directory)
    except LillamaError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    weights = list(directory.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in weights)
    checked = "headers are whole, names and shapes are those of config.json"
    if left:
        checked = f"headers are whole; not checked: {left}"
    sys.stdout.write(f"{directory}: {checked} ({_counted(len(weights), total)})\n")
    return 0


def _with_bar(check: Check, total: int, progress: Progress) -> list[str]:
    """What `check` finds; it tells of the bytes it is done with."""
    if total < LARGE:
        return check(lambda size: None)
    seen = 0
    with progress.phase("verify, MiB", total // MEGABYTE) as bar:

        def done(size: int) -> None:
            nonlocal seen
            bar.advance((seen + size) // MEGABYTE - seen // MEGABYTE)
            seen += size

        return check(done)


def _said(directory: Path, troubles: list[str], files: int, total: int) -> int:
    for trouble in troubles:
        sys.stdout.write(f"{trouble}\n")
    if troubles:
        sys.stdout.write(f"{directory}: {len(troubles)} of {_counted(files, total)} are not as they were written\n")
        return 1
    sys.stdout.write(f"{directory}: {_counted(files, total)}, all as they were written\n")
    return 0


def _counted(files: int, total: int) -> str:
    return f"{files} file{'' if files == 1 else 's'} ({total:,} bytes)"
