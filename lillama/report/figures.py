"""The charts of the report: what each takes from a run directory.

A figure is a function (record) -> the text of an SVG, or None where the run holds nothing for it; FIGURES names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lillama.report import plots
from lillama.report.record import STAGES, RunRecord, by_kind, finished_layers, is_finite_number, layer_label


def ranks(record: RunRecord) -> str | None:
    """How much of every weight is kept, by layer and kind; the rank in each cell."""
    weights = record.plan["weights"]
    if not weights:
        return None
    layers = list(dict.fromkeys(row["layer"] for row in weights))
    rows_of = by_kind(weights)
    kinds = list(rows_of)
    cells = {(row["layer"], kind): row for kind, rows in rows_of.items() for row in rows}

    def text(row: Mapping[str, Any] | None) -> str:
        return "" if row is None else "dense" if row["rank"] is None else str(row["rank"])

    chosen = [[cells.get((layer, kind)) for kind in kinds] for layer in layers]
    return plots.heat(
        [[row["after"] / row["parameters"] if row and row["parameters"] else None for row in line] for line in chosen],
        [[text(row) for row in line] for line in chosen],
        [layer_label(layer, layers) for layer in layers],
        [kind.rpartition(".")[2] or kind for kind in kinds] if _unique(kinds) else kinds,
        "share of the parameters kept",
        salt="ranks",
    )


def _unique(kinds: list[str]) -> bool:
    return len({kind.rpartition(".")[2] for kind in kinds}) == len(kinds)


def losses(record: RunRecord) -> str | None:
    """The held-out loss of every layer as it trains."""
    curves: dict[str, dict[int, float]] = {}
    for event in record.events:
        if event["event"] == "layer" and event["layer"] in curves and is_finite_number(event.get("initial_loss")):
            curves[event["layer"]][0] = event["initial_loss"]
        elif event["event"] == "check" and "layer" in event and is_finite_number(event["held_out_loss"]):
            curves.setdefault(event["layer"], {})[event["step"]] = event["held_out_loss"]
    series = [(layer_label(name, list(curves)), sorted(points.items())) for name, points in curves.items()]
    return plots.fan(series, "step", "held-out loss", salt="losses") if series else None


def layers(record: RunRecord) -> str | None:
    """Where every layer began and ended."""
    done = finished_layers(record)
    names = [event["layer"] for event in done]
    rows = [(layer_label(e["layer"], names), e["initial_loss"], e["loss"]) for e in done]
    rows = [row for row in rows if row[1] > 0 and row[2] > 0]
    return plots.span(rows, "layer", "held-out loss", ("at the start", "best"), salt="layers") if rows else None


def convergence(record: RunRecord) -> str | None:
    """Perplexity of the whole model while it is distilled."""
    points = [event for event in record.events if event["event"] == "curve"]
    if not points:
        return None
    one_by_one = record.settings["distill"]["schedule"] == "sequential"
    key, label = ("layers", "layers distilled") if one_by_one else ("tokens", "tokens seen")
    curve = sorted({event[key]: event["perplexity"] for event in points}.items())
    start = next((event["original"] for event in points if "original" in event), None)
    values = [value for _, value in curve]
    return plots.lines(
        {"student": curve},
        label,
        "perplexity",
        log=max(values) > 4 * min(values),
        level=None if start is None else ("original", start),
        salt="curve",
    )


def finetuning(record: RunRecord) -> str | None:
    """The held-out loss of fine-tuning."""
    points = {e["step"]: e["held_out_loss"] for e in record.events if e["event"] == "check" and e.get("finetune")}
    if len(points) < 2:
        return None  # a single number is no curve
    return plots.lines({"held out": sorted(points.items())}, "update", "loss, nats a label", salt="finetune")


def benchmarks(record: RunRecord) -> str | None:
    """Accuracy on every task, with standard errors."""
    metrics: dict[str, str] = {}  # task -> its main metric
    for measured in record.stages.values():
        detail = measured.get("details", {}).get("harness", {})
        metrics |= {task: f"{task}/{own['metric']}" for task, own in detail.get("tasks", {}).items()}
    if not metrics:
        return None
    tasks = list(metrics)[:30]
    series, errors = {}, {}
    for stage, label in STAGES.items():
        values = record.metrics.get(stage)
        if values:
            series[label] = [values.get(metrics[task]) for task in tasks]
            errors[label] = [values.get(f"{metrics[task]}_stderr") for task in tasks]
    return plots.bars(tasks, series, "accuracy", errors=errors, salt="tasks") if series else None


def speed(record: RunRecord) -> str | None:
    """How many times as fast, by length of prompt where `lillama bench` ran; else by what the run measured in turn."""
    phases = ("prefill", "decode")
    rows = [row for row in record.bench.get("rows", []) if "ratio" in row.get("prefill", {})]
    if len(rows) > 1:
        series = {phase: [(row["length"], row[phase]["ratio"][0]) for row in rows] for phase in phases}
        bands = {phase: [(row["length"], *row[phase]["ratio"][1:]) for row in rows] for phase in phases}
        return plots.lines(
            series,
            "tokens of the prompt",
            "times as fast",
            level=("original", 1.0),
            bands=bands,
            doubling=True,
            salt="speed",
        )
    values: dict[str, list[float | None]] = {}
    if rows:
        ratios = [rows[0][phase]["ratio"] for phase in phases]
        spread = {"compressed": [(high - low) / 2 for _, low, high in ratios]}
        values = {"original": [1.0, 1.0], "compressed": [middle for middle, _, _ in ratios]}
        return plots.bars(phases, values, "times as fast", errors=spread, salt="speed")
    return _speed_of_the_run(record)


def _speed_of_the_run(record: RunRecord) -> str | None:
    phases = ("prefill", "decode")
    values: dict[str, list[float | None]] = {}
    errors: dict[str, list[float | None]] = {}
    keys = [f"speed/{phase}_tokens_per_second" for phase in phases]
    base = record.metrics.get("before", {})
    for stage, label in STAGES.items():
        own, known = record.metrics.get(stage, {}), record.ratios(stage)
        if all(base.get(key) and key in own for key in keys):
            values[label] = [known[key][0] if key in known else own[key] / base[key] for key in keys]
            errors[label] = [(known[key][2] - known[key][1]) / 2 if key in known else None for key in keys]
    return plots.bars(phases, values, "times as fast", errors=errors, salt="speed") if len(values) > 1 else None


def stable_ranks(record: RunRecord) -> str | None:
    """Stable ranks of weights and activations over the layers, of the original."""
    rows = _stable(record, "before") or _stable(record, "after")
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    series = {kind.rpartition(".")[2]: [(r["layer"], r["value"]) for r in rows if r["kind"] == kind] for kind in kinds}
    return plots.lines(series, "layer", "stable rank", log=True, height=3.4, salt="stable")


def activations(record: RunRecord) -> str | None:
    """Stable rank of what the layers put out, original and compressed."""
    series, colors = {}, {}
    for stage, label in STAGES.items():
        points = [(row["layer"], row["value"]) for row in _stable(record, stage) if row["kind"] == "activations"]
        if points:
            series[label] = points
            colors[label] = plots.STAGE_COLORS[label]
    return plots.lines(series, "layer", "stable rank", colors=colors, salt="activations") if len(series) > 1 else None


def _stable(record: RunRecord, stage: str) -> list[dict[str, Any]]:
    details = record.stages.get(stage, {}).get("details", {})
    return next((d["rows"] for key, d in details.items() if key.partition("/")[0] == "stable_rank"), [])
