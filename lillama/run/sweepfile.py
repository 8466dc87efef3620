"""The sweep file: one recipe, axes of settings, and the runs they make."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lillama.errors import LillamaError, did_you_mean
from lillama.recipe import yamlfile
from lillama.recipe.schema import Section

MOST_RUNS = 1000
MOST_NAME = 200  # bytes; file systems take 255, and logs are named after it


class Sweep(Section):
    """A sweep file."""

    base: str = Field(description="The recipe that all runs share, beside this file.")
    set: list[str] = Field(default_factory=list, description="Overrides for every run: KEY=VALUE.")
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        min_length=1, description="A dotted key and its values, or any name and named sets of keys."
    )
    out: str = Field(description="Where the runs and the table go.")
    metrics: list[str] = Field(default_factory=list, description="Metrics of the table; none: the main ones there are.")
    keep: bool = Field(True, description="Keep the weights of each run; false: numbers and events alone.")


@dataclass
class Row:
    """One run: its place on the axes, what it gave, or why it gave nothing."""

    name: str
    values: dict[str, str]
    overrides: list[str]
    directory: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as sweep.json holds it."""
        return {"name": self.name, "values": self.values, "metrics": self.metrics, "curve": self.curve} | (
            {"error": self.error} if self.error else {}
        )


def load(path: str | Path) -> tuple[Sweep, Path]:
    """The sweep and the path of its base recipe. Raises LillamaError with file and line."""
    document = yamlfile.load(path)
    if not isinstance(document.data, Mapping):
        raise LillamaError("a sweep is a mapping of keys to values", where=document.name)
    try:
        sweep = Sweep.model_validate(document.data)
    except ValidationError as error:
        # A key that is misspelt is missing as well.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        place = tuple(part for part in problem["loc"] if not str(part).startswith(("list[", "dict[")))
        where = f"{document.where(place)}: {'.'.join(map(str, place))}"
        unknown = problem["type"] == "extra_forbidden"
        hint = did_you_mean(str(place[-1]), Sweep.model_fields) if unknown else None
        what = f"unknown key '{place[-1]}'" if unknown else problem["msg"]
        raise LillamaError(what, where=where, hint=hint) from error
    _check_axes(sweep, document)
    base = Path(path).parent / sweep.base
    try:
        beside = base.is_file()
    except OSError:  # too long a name
        beside = False
    return sweep, base if beside else Path(sweep.base)


def _check_axes(sweep: Sweep, document: yamlfile.Document) -> None:
    """LillamaError for axes that make no run, or more than anybody waits for."""
    for axis, values in sweep.axes.items():
        if not values:
            raise LillamaError("the axis has no values", where=f"{document.where(('axes', axis))}: axes.{axis}")
    count = math.prod(len(values) for values in sweep.axes.values())
    if count > MOST_RUNS:
        where = f"{document.where(('axes',))}: axes"
        raise LillamaError(f"the axes make {count:,} runs, more than {MOST_RUNS:,}", where=where, hint="Divide it.")


def is_sweep(path: str | Path) -> bool:
    """Whether a file that can be read is a sweep and not a recipe."""
    data = yamlfile.load(path).data
    return isinstance(data, Mapping) and "axes" in data


def rows(sweep: Sweep, overrides: list[str] | None = None) -> Iterator[Row]:
    """Every combination of the axes, the last axis changing fastest."""
    axes = [list(_points(axis, values)) for axis, values in sweep.axes.items()]
    for combination in itertools.product(*axes):
        values = {axis: label for axis, (label, _) in zip(sweep.axes, combination)}
        name = ",".join(re.sub(r"[^\w.+=-]+", "_", f"{axis.rpartition('.')[2]}={v}") for axis, v in values.items())
        own = [f"{key}={json.dumps(value)}" for _, keys in combination for key, value in keys.items()]
        if len(name.encode()) > MOST_NAME:
            raise LillamaError(f"a run's name is too long: {name[:60]} ...", where="axes", hint="Name the values.")
        directory = Path(sweep.out) / name
        out = f"run.out={json.dumps(str(directory))}"
        yield Row(name, values, [*sweep.set, *(overrides or []), *own, out], directory)


def _points(axis: str, values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, keys) of every point on an axis."""
    if isinstance(values, Mapping):
        yield from values.items()
    else:
        for value in values:
            yield value if isinstance(value, str) else json.dumps(value), {axis: value}
