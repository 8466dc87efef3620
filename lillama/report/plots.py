"""Charts as SVG for the report and for docs: text is text, and colours follow the page, light or dark.

matplotlib writes colours into an SVG; the ones drawn with here stand for CSS variables of the page (see INKS), with a
light theme's colour to fall back on, so that a chart also stands alone. All charts are narrow, to be read on a phone.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lillama.report.record import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.6  # inches of 72 points: no wider than a phone's page
# Drawn colour -> (CSS variable, its colour in a light theme).
INKS = {
    "#010101": ("--ink", "#1f2933"),
    "#020202": ("--grid", "#d5dae1"),
    "#030303": ("--original", "#64748b"),
    "#040404": ("--compressed", "#2563eb"),
    "#050505": ("--finetuned", "#c2410c"),
    "#060606": ("--quantized", "#0d9488"),
}
INK, GRID, ORIGINAL, COMPRESSED, FINETUNED, QUANTIZED = INKS
STAGE_COLORS = dict(zip(STAGES.values(), (ORIGINAL, COMPRESSED, FINETUNED, QUANTIZED), strict=True))
SERIES = (COMPRESSED, FINETUNED, QUANTIZED, "#a855f7", "#ca8a04", "#e11d48", "#0891b2", "#65a30d", ORIGINAL)
STYLES = ("-", "--", ":", "-.")
# Seen on white and on black alike.
DEPTH = ("#3b82f6", "#a855f7", "#f97316")

Points = Sequence[tuple[float, float]]


def _figure(height: float, salt: str) -> tuple[Any, Any]:
    """A figure and its axes, made without the state of pyplot."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "svg.hashsalt": salt})
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _dress(axes: Axes, x: str, y: str, *, grid: str = "y") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=INK, which="both", length=2.5, color=GRID)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8.5, **options)


def _svg(figure: Any, description: str) -> str:
    """The figure as an SVG element that scales with its place on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    for drawn, (variable, fallback) in INKS.items():
        text = text.replace(drawn, f"var({variable}, {fallback})")
    # The first family named would be matplotlib's own; the page's is wanted.
    text = re.sub(r"font:([^;\"]*?)px [^;\"]*", r"font:\1px system-ui, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(description)}" ', 1)


def standalone(svg: str) -> str:
    """A chart as a file of its own, which follows the reader's theme by itself."""
    dark = {"--ink": "#e6eaf0", "--grid": "#39424f", "--original": "#94a3b8", "--compressed": "#6ea8ff"}
    dark |= {"--finetuned": "#fb923c", "--quantized": "#2dd4bf"}
    rules = "; ".join(f"{name}: {color}" for name, color in dark.items())
    style = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {rules} }} }}</style>"
    return svg.replace(">", f">{style}", 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _compact(value: float, _: Any = None) -> str:
    """A number on an axis: 1.5k, 2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def lines(
    series: Mapping[str, Points],
    x: str,
    y: str,
    *,
    log: bool = False,
    level: tuple[str, float] | None = None,
    colors: Mapping[str, str] | None = None,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    doubling: bool = False,
    height: float = 2.9,
    salt: str = "lines",
) -> str:
    """One line a series through its points; `level` is a dashed line across; `log`: of the vertical axis.

    `bands`: a series' (x, lowest, highest), shaded. `doubling`: the horizontal axis is logarithmic, with a tick at
    every point.
    """
    figure, axes = _figure(height, salt)
    for i, (name, points) in enumerate(series.items()):
        color = (colors or {}).get(name, SERIES[i % len(SERIES)])
        style = "-" if colors else STYLES[i // len(SERIES) % len(STYLES)]
        found = [(a, b) for a, b in points if math.isfinite(b) and (b > 0 or not log)]
        if found:
            marker = "o" if len(found) < 20 else ""
            axes.plot(
                *zip(*found), color=color, linestyle=style, marker=marker, markersize=3, linewidth=1.5, label=name
            )
        if bands and name in bands:
            axes.fill_between(*zip(*bands[name]), color=color, alpha=0.15, linewidth=0)
    if level is not None:
        axes.axhline(level[1], color=ORIGINAL, linestyle="--", linewidth=1.2, label=level[0])
    _dress(axes, x, y)
    _scale(axes, log)
    ticks = sorted({a for points in series.values() for a, _ in points})
    if doubling:
        axes.set_xscale("log", base=2)
    if doubling or (len(ticks) < 8 and _apart(ticks)):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        _whole(axes)
    if len(series) > 1 or level is not None:
        columns = 2 if len(series) > 4 else 1
        # Above the axes where there are many, so that they hide nothing.
        places = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)} if len(series) > 3 else {"loc": "best"}
        _legend(axes, ncols=columns, **places)
    return _svg(figure, f"{y} against {x}: {', '.join(series)}")


def _apart(ticks: Sequence[float]) -> bool:
    """Whether the labels of ticks find room beside each other."""
    whole = ticks[-1] - ticks[0] if ticks else 0.0
    return all(b - a > 0.09 * whole for a, b in itertools.pairwise(ticks))


def _scale(axes: Axes, log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(_compact)


def _whole(axes: Axes) -> None:
    """Steps, layers and tokens are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(_compact)


def fan(series: Sequence[tuple[str, Points]], x: str, y: str, *, salt: str = "fan") -> str:
    """Many lines of one kind, coloured from the first to the last, on a logarithmic vertical axis."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    figure, axes = _figure(2.9, salt)
    colors = LinearSegmentedColormap.from_list("depth", DEPTH)
    for i, (_, points) in enumerate(series):
        found = [(a, b) for a, b in points if math.isfinite(b) and b > 0]
        if found:
            axes.plot(*zip(*found), color=colors(i / max(len(series) - 1, 1)), linewidth=1.1)
    _dress(axes, x, y)
    _scale(axes, True)
    _whole(axes)
    if len(series) > 1:
        scale = ScalarMappable(Normalize(0, len(series) - 1), colors)
        bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=30, ticks=[0, len(series) - 1])
        bar.ax.set_yticklabels([series[0][0], series[-1][0]], color=INK)
        bar.outline.set_visible(False)
    return _svg(figure, f"{y} against {x}, one line each for {series[0][0]} to {series[-1][0]}")


def span(rows: Sequence[tuple[str, float, float]], x: str, y: str, labels: tuple[str, str], *, salt: str) -> str:
    """For every row two dots joined by a line: where it began and where it ended (logarithmic)."""
    figure, axes = _figure(2.9, salt)
    places = range(len(rows))
    for i, (_, first, last) in enumerate(rows):
        axes.plot([i, i], [first, last], color=GRID, linewidth=2, zorder=1)
    axes.scatter(list(places), [row[1] for row in rows], s=14, color=ORIGINAL, label=labels[0], zorder=2)
    axes.scatter(list(places), [row[2] for row in rows], s=14, color=COMPRESSED, label=labels[1], zorder=3)
    _dress(axes, x, y)
    _scale(axes, True)
    step = max(math.ceil(len(rows) / 12), 1)
    axes.set_xticks(list(places)[::step], [row[0] for row in rows][::step])
    _legend(axes, loc="best")
    return _svg(figure, f"{y} of every {x}: {labels[0]} and {labels[1]}")


def heat(
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    salt: str = "heat",
) -> str:
    """A map of shares between 0 and 1, rows down and columns across, a text in each cell where there is room."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    figure, axes = _figure(max(0.155 * len(rows) + 1.3, 1.9), salt)
    table = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    colors = LinearSegmentedColormap.from_list("share", ("#1e40af", "#60a5fa", "#e8f1fd"))
    mesh = axes.pcolormesh(table, vmin=0, vmax=1, cmap=colors, edgecolors="face", linewidth=0.4)
    axes.set_ylim(len(rows), 0)
    step = max(math.ceil(len(rows) / 40), 1)
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), step)], rows[::step], fontsize=7.5)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=35, ha="right", fontsize=8)
    if len(rows) <= 48 and len(columns) <= 10:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                color = "#ffffff" if (values[i][j] or 0) < 0.35 else "#111827"
                axes.text(j + 0.5, i + 0.52, text, ha="center", va="center", fontsize=6.5, color=color)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="top", pad=0.01, aspect=40, shrink=0.8)
    bar.set_label(label, color=INK, fontsize=8.5)
    bar.ax.tick_params(colors=INK, length=0, labelsize=8)
    bar.outline.set_visible(False)
    return _svg(figure, f"{label}, by layer and kind of weight")


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    y: str,
    *,
    errors: Mapping[str, Sequence[float | None]] | None = None,
    log: bool = False,
    salt: str = "bars",
) -> str:
    """Bars side by side, lying down so that long names have room; `errors` are half-widths.

    `log`: dots on a logarithmic axis, where the length of a bar would say nothing.
    """
    figure, axes = _figure(max(0.2 * len(groups) * (len(series) + 0.6) + 0.9, 1.6), salt)
    thick = 0.8 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        places = [j + (i - (len(series) - 1) / 2) * thick for j in range(len(groups))]
        spread = (errors or {}).get(name) or [None] * len(groups)
        held = [(p, v, e or 0.0) for p, v, e in zip(places, values, spread) if v is not None]
        color = STAGE_COLORS.get(name, SERIES[i % len(SERIES)])
        if log:
            axes.scatter([v for _, v, _ in held], [p for p, _, _ in held], s=26, color=color, label=name)
        else:
            axes.barh([p for p, _, _ in held], [v for _, v, _ in held], thick * 0.92, color=color, label=name)
        for place, value, error in held:
            if error:
                axes.errorbar(value, place, xerr=error, ecolor=INK, elinewidth=0.9, capsize=2)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    _dress(axes, y, "", grid="x")
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_compact)
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
    return _svg(figure, f"{y} by {', '.join(groups)}")
