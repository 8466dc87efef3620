"""A result in the run directory is done again by nobody: one of other settings is an error that says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError


def differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys that differ; one that an earlier version did not know is as if it were null."""
    return sorted(key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key))


def refuse_other(held: Mapping[str, Any], wanted: Mapping[str, Any], *, section: str, what: str, place: Path) -> None:
    """LillamaError where `what`, which is in `place`, was made by another `section` of a recipe than the one wanted."""
    if keys := differing(held, wanted):
        raise LillamaError(
            f"the run holds {what} with another {', '.join(keys)}",
            where=f"{section}.{keys[0]}",
            hint=f"Give another run.out, or remove {place} to do it again.",
        )
