"""What a run directory holds, read for reports and tables. No figure and no page is made here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError

BENCH = "bench.json"


STAGES = {"before": "original", "after": "compressed", "finetuned": "fine-tuned"}


@dataclass
class Found:
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


def read(path: Path) -> Found:
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
    return Found(
        path,
        _json(path / "metrics.json"),
        _json(path / "plan.json"),
        _text(path / "recipe.yaml"),
        dict(yamlfile.load(path / "recipe.resolved.yaml").data),
        events,
        {stage: found for stage in STAGES if (found := _json(path / f"evaluation.{stage}.json"))},
        _json(path / BENCH),
        _json(path / "MANIFEST.json").get("fingerprint", {}),
        _json(path / "model" / "config.json"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_text(path) or "{}"))
    except ValueError:
        return {}


def layer_label(name: str, among: Sequence[str]) -> str:
    """The number of a layer where that tells it from the others, else its name."""
    numbered = [other for other in among if re.search(r"\d", other)]
    stems = {re.sub(r"\d+", "#", other) for other in numbered}
    last = [re.findall(r"\d+", other)[-1] for other in numbered]
    if name in numbered and len(stems) == 1 and len(set(last)) == len(last):
        return last[numbered.index(name)]
    return name


def _layers(found: Found) -> list[dict[str, Any]]:
    """The events of finished layers with a loss, the last of each, in the order of the model."""
    order = list(dict.fromkeys(row["layer"] for row in found.plan["weights"]))
    kept = {
        event["layer"]: event
        for event in found.events
        if event["event"] == "layer" and _finite(event.get("loss")) and _finite(event.get("initial_loss"))
    }
    return [kept[name] for name in order if name in kept]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300
