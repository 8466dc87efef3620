"""The charts of the report: what each takes from a run directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lillama.report import plots

if TYPE_CHECKING:
    from lillama.report.record import Found


def ranks(found: Found) -> str | None:
    """How much of every weight is kept, by layer and kind; the rank in each cell."""
    from lillama.report.record import layer_label

    weights = found.plan["weights"]
    if not weights:
        return None
    layers = list(dict.fromkeys(row["layer"] for row in weights))
    kinds = list(dict.fromkeys(_kind(row) for row in weights))
    cells = {(row["layer"], _kind(row)): row for row in weights}

    def text(row: dict[str, Any] | None) -> str:
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


def _kind(row: dict[str, Any]) -> str:
    return str(row["weight"]).removeprefix(f"{row['layer']}.")


def _unique(kinds: list[str]) -> bool:
    return len({kind.rpartition(".")[2] for kind in kinds}) == len(kinds)


def losses(found: Found) -> str | None:
    """The held-out loss of every layer as it trains."""
    from lillama.report.record import _finite, layer_label

    curves: dict[str, dict[int, float]] = {}
    for event in found.events:
        if event["event"] == "layer" and event["layer"] in curves and _finite(event.get("initial_loss")):
            curves[event["layer"]][0] = event["initial_loss"]
        elif event["event"] == "check" and "layer" in event and _finite(event["held_out_loss"]):
            curves.setdefault(event["layer"], {})[event["step"]] = event["held_out_loss"]
    series = [(layer_label(name, list(curves)), sorted(points.items())) for name, points in curves.items()]
    return plots.fan(series, "step", "held-out loss", salt="losses") if series else None


def layers(found: Found) -> str | None:
    """Where every layer began and ended."""
    from lillama.report.record import _layers, layer_label

    done = _layers(found)
    names = [event["layer"] for event in done]
    rows = [(layer_label(e["layer"], names), e["initial_loss"], e["loss"]) for e in done]
    rows = [row for row in rows if row[1] > 0 and row[2] > 0]
    return plots.span(rows, "layer", "held-out loss", ("at the start", "best"), salt="layers") if rows else None


def convergence(found: Found) -> str | None:
    """Perplexity of the whole model while it is distilled."""
    points = [event for event in found.events if event["event"] == "curve"]
    if not points:
        return None
    one_by_one = found.settings["distill"]["schedule"] == "sequential"
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


def finetuning(found: Found) -> str | None:
    """The held-out loss of fine-tuning."""
    points = {e["step"]: e["held_out_loss"] for e in found.events if e["event"] == "check" and e.get("finetune")}
    return plots.lines({"held out": sorted(points.items())}, "update", "loss", salt="finetune") if points else None


def benchmarks(found: Found) -> str | None:
    """Accuracy on every task, with standard errors."""
    from lillama.report.record import STAGES

    metrics: dict[str, str] = {}  # task -> its main metric
    for measured in found.stages.values():
        detail = measured.get("details", {}).get("harness", {})
        metrics |= {task: f"{task}/{own['metric']}" for task, own in detail.get("tasks", {}).items()}
    if not metrics:
        return None
    tasks = list(metrics)[:30]
    series, errors = {}, {}
    for stage, label in STAGES.items():
        values = found.metrics.get(stage)
        if values:
            series[label] = [values.get(metrics[task]) for task in tasks]
            errors[label] = [values.get(f"{metrics[task]}_stderr") for task in tasks]
    return plots.bars(tasks, series, "accuracy", errors=errors, salt="tasks") if series else None


def speed(found: Found) -> str | None:
    """How many times as fast, by length of prompt where `lillama bench` ran; else of the run's own figures."""
    from lillama.report.record import STAGES

    phases = ("prefill", "decode")
    rows = [row for row in found.bench.get("rows", []) if "ratio" in row.get("prefill", {})]
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
    keys = [f"speed/{phase}_tokens_per_second" for phase in phases]
    base = found.metrics.get("before", {})
    for stage, label in STAGES.items():
        own = found.metrics.get(stage, {})
        if all(base.get(key) and key in own for key in keys):
            values[label] = [own[key] / base[key] for key in keys]
    return plots.bars(phases, values, "times as fast", salt="speed") if len(values) > 1 else None


def stable_ranks(found: Found) -> str | None:
    """Stable ranks of weights and activations over the layers, of the original."""
    rows = _stable(found, "before") or _stable(found, "after")
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    series = {kind.rpartition(".")[2]: [(r["layer"], r["value"]) for r in rows if r["kind"] == kind] for kind in kinds}
    return plots.lines(series, "layer", "stable rank", log=True, height=3.4, salt="stable")


def activations(found: Found) -> str | None:
    """Stable rank of what the layers put out, original and compressed."""
    from lillama.report.record import STAGES

    series, colors = {}, {}
    for stage, label in STAGES.items():
        points = [(row["layer"], row["value"]) for row in _stable(found, stage) if row["kind"] == "activations"]
        if points:
            series[label] = points
            colors[label] = dict(zip(STAGES.values(), (plots.ORIGINAL, plots.COMPRESSED, plots.FINETUNED)))[label]
    return plots.lines(series, "layer", "stable rank", colors=colors, salt="activations") if len(series) > 1 else None


def _stable(found: Found, stage: str) -> list[dict[str, Any]]:
    details = found.stages.get(stage, {}).get("details", {})
    return next((d["rows"] for key, d in details.items() if key.partition("/")[0] == "stable_rank"), [])


ALL: dict[str, Callable[[Found], str | None]] = {
    "ranks": ranks,
    "losses": losses,
    "layers": layers,
    "convergence": convergence,
    "finetuning": finetuning,
    "benchmarks": benchmarks,
    "speed": speed,
    "stable_ranks": stable_ranks,
    "activations": activations,
}
