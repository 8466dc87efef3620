"""The recipes that come with the package, known by their names: `lillama run quickstart`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lillama.errors import LillamaError, nearest, quoted

PACKAGE = Path(__file__).parents[1]
# In a wheel they lie inside the package; in a checkout beside it (pyproject.toml, force-include).
PLACES = (PACKAGE / "shipped", PACKAGE.parent / "recipes")
SWEEPS = "paper"  # the folder of the files that `lillama sweep` takes


@dataclass(frozen=True)
class Shipped:
    """One recipe or sweep: what it is called, its file, and the first sentence of the comment it begins with."""

    name: str
    path: Path

    @property
    def sweep(self) -> bool:
        return self.name.startswith(f"{SWEEPS}/")

    @property
    def summary(self) -> str:
        lines: list[str] = []
        for line in self.path.read_text().splitlines():
            if not line.startswith("# "):
                break
            lines.append(line[2:].strip())
        text = " ".join(lines)
        return re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0]


def recipes() -> dict[str, Shipped]:
    """Every shipped recipe by its name, in alphabetical order, sweeps last."""
    place = next((place for place in PLACES if place.is_dir()), None)
    if place is None:
        return {}
    found = [Shipped(path.relative_to(place).with_suffix("").as_posix(), path) for path in place.rglob("*.yaml")]
    return {one.name: one for one in sorted(found, key=lambda one: (one.sweep, one.name))}


def find(given: str) -> Path:
    """The file that `given` means: a file of that name, or the shipped recipe that is called so.

    A shipped one may be given with its ending or without. Raises LillamaError for a name that is neither and has no
    ending; what looks like a file is returned as it is, for whoever reads it to complain about.
    """
    path = Path(given)
    if path.exists():
        return path
    known = recipes()
    name = given.removesuffix(".yaml")
    if name in known:
        return known[name].path
    if path.suffix:
        return path
    close = nearest(name, known)
    raise LillamaError(
        f"there is no file '{given}', and no shipped recipe of that name",
        where="recipe",
        hint=f"Did you mean {quoted(close)}?" if close else "`lillama recipes` lists the shipped ones.",
    )
