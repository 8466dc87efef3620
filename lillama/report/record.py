"""What a run directory holds, read for reports and tables. No figure and no page is made here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama.base import manifest
from lillama.base.rundir import EVENTS, FINETUNED, MODEL, QUANTIZED, RESOLVED
from lillama.errors import LillamaError
from lillama.report import shapes

BENCH = "bench.json"
IN_TURN = "evaluation.speed.json"  # what was measured of all models in turn
# What a run measures, and what people call the model it is measured on.
STAGES = {"before": "original", "after": "compressed", "finetuned": "fine-tuned", "quantized": "quantised"}


PLACES = {"after": MODEL, "finetuned": FINETUNED, "quantized": QUANTIZED}  # their folders, in their order


@dataclass
class RunRecord:
    """What a run directory holds: missing parts are empty."""

    path: Path
    metrics: dict[str, Any]
    plan: dict[str, Any]
    recipe: str
    settings: dict[str, Any]
    events: list[dict[str, Any]]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def ratios(self, stage: str) -> dict[str, list[float]]:
        """`ratios_of` what is known of a stage."""
        return ratios_of(self.stages.get(stage, {}).get("details", {}))

    @property
    def last(self) -> str:
        """The stage of the run's result."""
        return last_stage(self.metrics)


def read(path: Path) -> RunRecord:
    """What `path` holds. Raises LillamaError where it is no run directory."""
    from lillama.recipe import yamlfile

    if not (path / "plan.json").is_file() or not (path / RESOLVED).is_file():
        raise LillamaError("this is not a run directory", where=str(path), hint="Give the run.out of a recipe.")
    resolved = path / RESOLVED
    settings = yamlfile.load(resolved).data
    shapes.check(settings, shapes.RECIPE, resolved)
    return RunRecord(
        path,
        _checked(path / "metrics.json", shapes.RESULT),
        _checked(path / "plan.json", shapes.PLAN) or _no_plan(path / "plan.json"),
        read_text(path / "recipe.yaml"),
        settings,
        read_events(path / EVENTS),
        _stages(path),
        _checked(path / BENCH, shapes.BENCH),
        _checked(path / manifest.NAME, shapes.MANIFEST).get("fingerprint") or {},
        _checked(path / MODEL / "config.json", shapes.MODEL),
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run; a line that is none is left out, as the last one of a run that was killed."""
    found = []
    for line in read_text(path).splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        named = isinstance(event, dict) and isinstance(event.get("event"), str)
        if named and (event["event"] != "layer" or isinstance(event.get("layer"), str)):
            found.append(event)
    return found


def _stages(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured at each stage, with what was measured of all models in turn."""
    files = {stage: path / f"evaluation.{stage}.json" for stage in STAGES}
    stages = {stage: held for stage, file in files.items() if (held := _checked(file, shapes.STAGE))}
    for stage, held in (_checked(path / IN_TURN, shapes.IN_TURN).get("stages") or {}).items():
        known = stages.setdefault(stage, {})
        known["details"] = (known.get("details") or {}) | held["details"]
    for stage, held in stages.items():
        held["details"] = held.get("details") or {}
        shapes.check_details(held["details"], files.get(stage, path / IN_TURN))
    return stages


def _checked(path: Path, shape: Any) -> dict[str, Any]:
    """What a JSON file of a run holds, as `read_json`. Raises LillamaError where it looks otherwise than `shape`."""
    held = read_json(path)
    if held:
        shapes.check(held, shape, path)
    return held


def _no_plan(path: Path) -> dict[str, Any]:
    raise LillamaError("the plan was not written to its end", where=str(path), hint="Run the recipe again.")


def read_text(path: Path) -> str:
    """The text of a file, empty where there is none; what is no text in it is replaced."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds, empty where there is none or it was not written to its end.

    Raises LillamaError where it holds something else than an object.
    """
    try:
        held = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    shapes.check(held, shapes.Each(shapes.anything), path)
    return dict(held)


def last_stage(metrics: Mapping[str, Any]) -> str:
    """The stage of what a run ends with, of its metrics.json."""
    return [stage for stage in PLACES if stage == "after" or stage in metrics][-1]


def ratios_of(details: Mapping[str, Any]) -> dict[str, list[float]]:
    """[median, smallest, largest] of how many times as large as the original's a metric is, where that was measured."""
    held = (detail.get("ratio", {}) for detail in details.values() if isinstance(detail, dict))
    return {name: ratio for one in held for name, ratio in one.items()}


def layer_label(name: str, among: Sequence[str]) -> str:
    """The number of a layer where that tells it from the others, else its name."""
    numbered = [other for other in among if re.search(r"\d", other)]
    stems = {re.sub(r"\d+", "#", other) for other in numbered}
    last = [re.findall(r"\d+", other)[-1] for other in numbered]
    if name in numbered and len(stems) == 1 and len(set(last)) == len(last):
        return last[numbered.index(name)]
    return name


def finished_layers(record: RunRecord) -> list[dict[str, Any]]:
    """The events of finished layers with a loss, the last of each, in the order of the model."""
    order = list(dict.fromkeys(row["layer"] for row in record.plan["weights"]))
    kept = {
        event["layer"]: event
        for event in record.events
        if event["event"] == "layer" and all(is_finite_number(event.get(key)) for key in ("loss", "initial_loss"))
    }
    return [kept[name] for name in order if name in kept]


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number that a chart can show; what overflowed on the way is none."""
    return shapes.number(value)


def kind_of(row: Mapping[str, Any]) -> str:
    """The name of a weight inside its layer, from its row of plan.json."""
    return str(row["weight"]).removeprefix(f"{row['layer']}.")


def by_kind(weights: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of plan.json, those of the same place in their layers together."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in weights:
        kinds.setdefault(kind_of(row), []).append(row)
    return kinds
