"""Many runs of one recipe that differ in chosen keys, and a table of what came out: `lillama sweep`.

    base: ../quickstart.yaml            # beside this file
    set: [calibration.tokens=8192]      # for every run
    axes:
      distill.objective: [l1_logcos, mse]
      start:                            # values with names, each of several keys
        svd: {compress.init: svd}
        whitened: {compress.init: whitened, compress.gram_tokens: 16384}
    out: runs/sweep

Every combination runs in a directory of its own below `out`; finished ones are not run again, and one that fails is a
row with its error.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.base.rundir import CHECKPOINTS, EVENTS, FISHER, ORIGINAL, RESOLVED
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe
from lillama.report.record import read_events
from lillama.run.sweepfile import Row, Sweep, rows

if TYPE_CHECKING:
    from lillama.base.progress import Progress

HEAVY = (*CHECKPOINTS, "layers", ORIGINAL, "streams")


def recipes(base: Path, found: list[Row]) -> dict[str, Recipe]:
    """The recipe of every run by its name. Raises LillamaError for any that is not valid, and for equal names."""
    if len({row.directory for row in found}) < len(found):
        raise LillamaError("two runs of the sweep have the same name", where="axes", hint="Name the values.")
    return {row.name: Recipe.load(base, row.overrides) for row in found}


def run(sweep: Sweep, base: Path, progress: Progress, overrides: list[str] | None = None) -> list[Row]:
    """Run what is not finished, and write the table after every run; returns all rows."""
    found = list(rows(sweep, overrides))
    valid = recipes(base, found)  # a mistake shows before hours of work
    out = Path(sweep.out)
    out.mkdir(parents=True, exist_ok=True)
    shared = _Shared(out)
    for number, row in enumerate(found, 1):
        progress.say(f"[{number}/{len(found)}] {row.name}")
        try:
            if not _finished(row, valid[row.name]):
                shared.run(valid[row.name], progress)
            _collect(row)
            if not sweep.keep:
                for name in HEAVY:
                    shutil.rmtree(row.directory / name, ignore_errors=True)
        except LillamaError as error:
            row.error = " ".join(str(error).split())
        except Exception as error:  # a row with its error; the others still run
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if row.error:
            progress.say(f"failed: {row.error}")
        _write(sweep, found[:number])
    shared.drop()
    return found


class _Shared:
    """What all runs of one original have in common, and is done once: unpacking it, and what common.py shares."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.before: dict[str, dict[str, Any]] = {}

    def run(self, recipe: Recipe, progress: Progress) -> None:
        from lillama.base.progress import Progress
        from lillama.pretrained.locate import resolve
        from lillama.run import pipeline, prepare
        from lillama.run.common import Common

        gguf = resolve(recipe.model)[1]
        if gguf:
            recipe = self._unpacked(recipe, gguf)
        prepared = prepare.prepare(recipe)
        key = json.dumps([prepared.source.identity(), str(prepared.source.dtype)], sort_keys=True)
        # A Progress of its own: it adds up the seconds of one run.
        own = Progress(progress.console)
        pipeline.Run(prepared, own, common=Common(self.out, self.before.get(key))).execute()
        measured = Path(recipe.run.out) / "evaluation.before.json"
        if measured.is_file():
            self.before[key] = json.loads(measured.read_text())

    def drop(self) -> None:
        """Remove what no run needs once all are done."""
        if (self.out / FISHER).is_dir():  # else torch need not be imported to say so
            from lillama.run.common import Common

            Common(self.out).drop()

    def _unpacked(self, recipe: Recipe, gguf: str) -> Recipe:
        from lillama.run import prepare

        place = self.out / f"original-{re.sub(r'[^0-9A-Za-z._-]+', '_', gguf)}-{recipe.model.dtype}"
        if not (place / ORIGINAL).is_dir():
            prepare.prepare(recipe).source.fetch(place)
        model = recipe.model.model_copy(update={"id": str(place / ORIGINAL), "gguf_file": None})
        return recipe.model_copy(update={"model": model})


def _finished(row: Row, recipe: Recipe) -> bool:
    """Whether the run is done; what evaluates it must be the same too. The engine checks all else."""
    if not (row.directory / "metrics.json").is_file() or not (row.directory / RESOLVED).is_file():
        return False
    held = Recipe.load(row.directory / RESOLVED).model_dump(exclude={"model": {"id", "gguf_file"}})
    return bool(held == recipe.model_dump(exclude={"model": {"id", "gguf_file"}}))


def _collect(row: Row) -> None:
    """Read a finished run's numbers."""
    row.metrics = json.loads((row.directory / "metrics.json").read_text())
    events = read_events(row.directory / EVENTS)
    row.curve = [event for event in events if event["event"] == "curve"]


def collected(sweep: Sweep) -> list[Row]:
    """The rows of what has run so far, without running anything."""
    found = list(rows(sweep))
    for row in found:
        if (row.directory / "metrics.json").is_file():
            _collect(row)
        else:
            row.error = "not run"
    return found


def _write(sweep: Sweep, found: list[Row]) -> None:
    from lillama.base.files import write_json, write_text
    from lillama.run import sweeptable

    out = Path(sweep.out)
    table = sweeptable.table(sweep, found)
    write_json(out / "sweep.json", [row.to_dict() for row in found])
    write_text(out / "sweep.csv", sweeptable.csv_text(table))
    write_text(out / "sweep.md", sweeptable.markdown(table))
    for name, draw in (("sweep.svg", sweeptable.chart), ("curves.svg", sweeptable.curves)):
        svg = draw(sweep, found)
        if svg:
            write_text(out / name, svg)
