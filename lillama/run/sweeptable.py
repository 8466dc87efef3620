"""What a sweep found, as a table and as charts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lillama.report import plots
from lillama.report.record import last_stage
from lillama.report.words import main_metrics, metric_name, number

if TYPE_CHECKING:
    from lillama.run.sweepfile import Row, Sweep

Table = list[dict[str, str]]


def chosen(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The metrics of the table: the sweep's, else the main ones of its runs."""
    if sweep.metrics:
        return sweep.metrics
    names = dict.fromkeys(name for row in rows for name in row.metrics.get("after", {}))
    timings = ("tokens_per_second",)
    return [name for name in main_metrics(list(names)) if not name.endswith(timings)][:3]


def _last(row: Row) -> dict[str, float]:
    """The metrics of what the run ends with."""
    return dict(row.metrics.get(last_stage(row.metrics)) or {})


def table(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """A row a run: axes, metrics, parameters removed, time, or the error."""
    found: Table = []
    metrics = chosen(sweep, rows)
    few_bits = any("quantized" in row.metrics for row in rows)  # then parameters do not say how much is left
    for row in rows:
        cells = {axis.rpartition(".")[2]: value for axis, value in row.values.items()}
        for name in metrics:
            cells[metric_name(name)] = number(_last(row).get(name))
        if row.metrics:
            counts = row.metrics["parameters"]
            cells["parameters removed"] = f"{1 - counts['after'] / counts['before']:.1%}"
            if few_bits:
                held = row.metrics["bytes"]
                cells["weights MiB"] = f"{held.get(last_stage(row.metrics), held['after']) / 2**20:.1f}"
            seconds = row.metrics["seconds"]
            cells["distillation s"] = number(sum(seconds.get(p, 0.0) for p in ("embed", "initialise", "distil")))
        if row.error:
            cells["error"] = row.error
        found.append(cells)
    originals = [row.metrics["before"] for row in rows if row.metrics.get("before")]
    if originals and any(name in originals[0] for name in metrics):
        first = {next(iter(found[0])): "original"}
        found.append(first | {metric_name(name): number(originals[0].get(name)) for name in metrics})
    return found


def _columns(found: Table) -> list[str]:
    return list(dict.fromkeys(name for cells in found for name in cells))


def csv_text(found: Table) -> str:
    """The table for spreadsheets."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _columns(found), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: value.replace(",", "") for name, value in cells.items()} for cells in found)
    return stream.getvalue()


def markdown(found: Table) -> str:
    """The table for a page."""
    columns = _columns(found)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells.get(name, "").replace("|", "\\|") for name in columns) + " |" for cells in found]
    return "\n".join(lines) + "\n"


def terminal(found: Table) -> Any:
    """The table for a person at a terminal."""
    from rich.table import Table as RichTable

    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in _columns(found):
        shown.add_column(name, justify="left" if name == "error" else "right")
    for cells in found:
        shown.add_row(*(cells.get(name, "") for name in _columns(found)))
    return shown


def chart(sweep: Sweep, rows: Sequence[Row]) -> str | None:
    """The first metric over the axes: lines over an axis of numbers where there is one, else bars."""
    metrics = chosen(sweep, rows)
    done = [row for row in rows if metrics and _usable(_last(row).get(metrics[0]))]
    if not done:
        return None
    metric = metrics[0]
    value = {row.name: _last(row)[metric] for row in done}
    varied = [a for a in sweep.axes if len({row.values[a] for row in done}) > 1]
    axis = next((a for a in varied if all(_is_number(row.values[a]) for row in done)), None)
    others = [a for a in varied if a != axis]

    def label(row: Row, axes: Sequence[str]) -> str:
        return ", ".join(row.values[a] for a in axes) or "all"

    wide = max(value.values()) > 8 * min(value.values()) > 0
    if axis is not None:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in done:
            series.setdefault(label(row, others), []).append((float(row.values[axis]), value[row.name]))
        ordered = {name: sorted(points) for name, points in series.items()}
        name = axis.rpartition(".")[2].replace("_", " ")
        return plots.standalone(plots.lines(ordered, name, metric_name(metric), log=wide, salt="sweep"))
    first, rest = others[:1] or list(sweep.axes)[:1], others[1:]
    groups = list(dict.fromkeys(label(row, rest) for row in done)) if rest else [metric_name(metric)]
    bars: dict[str, list[float | None]] = {}
    for row in done:
        own = bars.setdefault(label(row, first), [None] * len(groups))
        own[groups.index(label(row, rest)) if rest else 0] = value[row.name]
    return plots.standalone(plots.bars(groups, bars, metric_name(metric), log=wide, salt="sweep"))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value < 1e300


def curves(sweep: Sweep, rows: Sequence[Row]) -> str | None:
    """Perplexity of the whole model against what was seen, a line a run."""
    with_curve = [row for row in rows if row.curve]
    if not with_curve:
        return None
    axes = [a for a in sweep.axes if len({row.values[a] for row in with_curve}) > 1] or list(sweep.axes)
    tokens = all(point["layers"] == row.curve[0]["layers"] for row in with_curve for point in row.curve)
    key, label = ("tokens", "tokens seen") if tokens else ("layers", "layers distilled")
    series = {
        ", ".join(row.values[a] for a in axes): sorted({p[key]: p["perplexity"] for p in row.curve}.items())
        for row in with_curve
    }
    level = ("original", with_curve[0].curve[0]["original"])
    svg = plots.lines(series, label, "perplexity", log=True, level=level, height=4.0, salt="curves")
    return plots.standalone(svg)
