"""What a run directory holds, read for reports and tables. No figure and no page is made here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError

BENCH = "bench.json"
IN_TURN = "evaluation.speed.json"  # what was measured of all models in turn
# What a run measures, and what people call the model it is measured on.
STAGES = {"before": "original", "after": "compressed", "finetuned": "fine-tuned"}


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


def read(path: Path) -> RunRecord:
    """What `path` holds. Raises LillamaError where it is no run directory."""
    from lillama.recipe import yamlfile

    if not (path / "plan.json").is_file() or not (path / "recipe.resolved.yaml").is_file():
        raise LillamaError("this is not a run directory", where=str(path), hint="Give the run.out of a recipe.")
    events = []
    if (path / "events.jsonl").is_file():
        for line in (path / "events.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:  # the last line of a run that was killed
                continue
    stages = {stage: held for stage in STAGES if (held := read_json(path / f"evaluation.{stage}.json"))}
    for stage, held in read_json(path / IN_TURN).get("stages", {}).items():
        known = stages.setdefault(stage, {})
        known["details"] = known.get("details", {}) | held["details"]
    return RunRecord(
        path,
        read_json(path / "metrics.json"),
        read_json(path / "plan.json"),
        read_text(path / "recipe.yaml"),
        dict(yamlfile.load(path / "recipe.resolved.yaml").data),
        events,
        stages,
        read_json(path / BENCH),
        read_json(path / "MANIFEST.json").get("fingerprint", {}),
        read_json(path / "model" / "config.json"),
    )


def read_text(path: Path) -> str:
    """The text of a file, empty where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds, empty where there is none or it was not written to its end."""
    try:
        return dict(json.loads(read_text(path) or "{}"))
    except ValueError:
        return {}


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
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300


def kind_of(row: Mapping[str, Any]) -> str:
    """The name of a weight inside its layer, from its row of plan.json."""
    return str(row["weight"]).removeprefix(f"{row['layer']}.")


def by_kind(weights: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of plan.json, those of the same place in their layers together."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in weights:
        kinds.setdefault(kind_of(row), []).append(row)
    return kinds
