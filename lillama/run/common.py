"""What runs of one original do once between them: what it writes and scores, and what its predictions depend on.

A sweep over sizes measures the sensitivity of the predictions in its first run; those that follow take it over, since
nothing of it depends on how small the result is to be. The files are linked, so that they take no room of their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama.base import ranks
from lillama.base.files import checksum, sync_directory
from lillama.base.rundir import CALIBRATION, FISHER, RunDirectory

# Of what a recipe says of compressing, what no measurement depends on: it says what becomes of it. Of how layers learn
# none depends on anything but how the text is put into batches.
NOT_IN_THE_MEASUREMENT = (
    "reduction",
    "strategy",
    "min_rank",
    "rank_step",
    "keep_dense_below",
    "init",
    "storage",
    "gram_tokens",
)


@dataclass(frozen=True)
class Common:
    """Where runs share what they would all do alike.

    `before` is what another run's evaluation.before.json holds, of the same original.
    """

    place: Path
    before: dict[str, Any] | None = None

    @property
    def texts(self) -> Path:
        """Where texts are that a model wrote itself."""
        return self.place / CALIBRATION

    def take(self, directory: RunDirectory, fingerprint: dict[str, Any], files: Sequence[str]) -> bool:
        """Take over `files`, of what was measured, into a run directory that lacks some; whether that was done."""
        shared = self._measured(fingerprint)
        if all(directory.has(file) for file in files):
            return False

        def link_all() -> None:
            if not all((shared / Path(file).name).is_file() for file in files):
                return
            for file in files:
                target = directory.path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)  # what a run left that was killed before it noted it
                _link(shared / target.name, target)
            directory.record(*files)

        directory.by_first(link_all)
        return all(directory.has(file) for file in files)

    def leave(self, directory: RunDirectory, fingerprint: dict[str, Any], files: Sequence[str]) -> None:
        """Leave `files` of a run directory for others: all of them or, where somebody interrupts, none."""
        shared = self._measured(fingerprint)
        if not ranks.is_first() or shared.exists():
            return
        shared.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{shared.name}.", suffix=".part", dir=shared.parent))
        try:
            for file in files:
                _link(directory.path / file, temporary / Path(file).name)
            try:
                temporary.rename(shared)
            except OSError:
                if not shared.exists():  # another run left the same meanwhile
                    raise
            sync_directory(shared.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def drop(self) -> None:
        """Remove what was measured; texts stay, for they are small, and take long to write."""
        shutil.rmtree(self.place / FISHER, ignore_errors=True)

    def _measured(self, fingerprint: dict[str, Any]) -> Path:
        """Where what was measured by runs like this one is."""
        recipe = dict(fingerprint["recipe"])
        compress = {key: value for key, value in recipe["compress"].items() if key not in NOT_IN_THE_MEASUREMENT}
        # Where bytes are given, what few bits would cost is measured too, for groups of the recipe's size: how many
        # bytes, and of which widths, is for the ranks to know.
        by_bytes = compress.pop("size", None) is not None
        recipe["compress"] = compress
        recipe["distill"] = recipe["distill"]["batch_size"]
        recipe["quantize"] = (recipe.get("quantize") or {}).get("group_size") if by_bytes else None
        return self.place / FISHER / checksum({**fingerprint, "recipe": recipe})[:16]


def _link(source: Path, target: Path) -> None:
    """One file under two names; copied where the file system knows no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
