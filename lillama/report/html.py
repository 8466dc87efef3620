"""One HTML file that says what a run did: `lillama report DIR`. Nothing in it comes from the network.

It is made from the files of the run directory alone, so it can be made again at any time, and of runs that stopped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lillama.base.files import write_text
from lillama.base.progress import clock
from lillama.errors import LillamaError
from lillama.registry import FIGURES
from lillama.report import fewbits
from lillama.report.record import PLACES, STAGES, RunRecord, finished_layers, layer_label, read
from lillama.report.words import main_metrics, metric_name, millions, number, size, spread
from lillama.version import __version__

NAME = "report.html"
# The figures that the template has a place for. Those of plugins follow, each under its name.
PLACED = (
    "ranks",
    "losses",
    "layers",
    "convergence",
    "finetuning",
    "benchmarks",
    "speed",
    "stable_ranks",
    "activations",
)


def write(path: Path) -> Path:
    """Write the report into the run directory; returns the file. A chart that fails is left out and named there."""
    text = render(read(path))
    try:
        write_text(path / NAME, text)
    except OSError as error:
        raise LillamaError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(path / NAME),
            hint="Is the disk full, or the directory somebody else's?",
        ) from error
    return path / NAME


def write_or_say(path: Path, say: Callable[[str], None]) -> None:
    """Write the report; whatever goes wrong there is said and must not cost the run."""
    try:
        write(path)
    except Exception as error:
        say(f"the report could not be written ({type(error).__name__}: {error})")


def render(record: RunRecord) -> str:
    """The report as HTML."""
    from jinja2 import Environment

    template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clock": clock, "number": number, "size": size}
    drawn = charts(record)
    name = Path(str(record.settings["model"]["id"]).removeprefix("package:")).name
    return environment.from_string(template).render(
        record=record,
        name=name,
        version=__version__,
        tiles=tiles(record),
        table=comparison(record),
        results=[STAGES[stage] for stage in PLACES if stage in record.metrics],
        few_bits=fewbits.rows(record),
        charts=drawn,
        in_turn=bool(record.bench or any(map(record.ratios, STAGES))),
        others=[name for name in drawn if name not in PLACED],
        worst=worst(record),
        incidents=incidents(record),
        samples=samples(record),
        tasks=_harness_note(record),
        windows=_windows_note(record),
        environment=environment_of(record),
        seconds={phase: value for phase, value in record.metrics.get("seconds", {}).items() if value >= 0.5},
        load=how_to_load(record),
        recipe=record.recipe,
    )


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the figures on top."""
    counts = record.plan["parameters"]
    shown = [
        (
            "parameters",
            f"{record.plan['reduction']:.1%} fewer",
            f"{millions(counts['before'])} → {millions(counts['after'])}",
        )
    ]
    m = record.metrics
    if m:
        before, after = m["bytes"]["before"], m["bytes"].get(record.last) or m["bytes"]["after"]
        shown.append(("weights on disk", f"{1 - after / before:.1%} less", f"{size(before)} → {size(after)}"))
        for name in main_metrics(m["before"])[:3]:
            a, b = m["before"].get(name), m[record.last].get(name)
            if a and b is not None:
                ratio = record.ratios(record.last).get(name, [b / a])[0]
                shown.append((metric_name(name), f"x {ratio:.3g}", f"{number(a)} → {number(b)}"))
        shown.append(("took", clock(sum(m["seconds"].values())), f"peak memory {size(m['peak_memory_bytes'])}"))
    return shown


def comparison(record: RunRecord) -> list[dict[str, Any]]:
    """Rows of the table before, after: name, numbers with their errors, and the change."""
    m = record.metrics
    stages = [stage for stage in STAGES if stage in m]
    rows = []
    for name in dict.fromkeys(key for stage in stages for key in m[stage]):
        if name.endswith("_stderr"):
            continue
        values = [m[stage].get(name) for stage in stages]
        errors = [m[stage].get(f"{name}_stderr") for stage in stages]
        cells = [number(v) + (f" ± {e:.2g}" if e else "") for v, e in zip(values, errors)]
        changes = [
            f"x {v / values[0]:.3g}" if v is not None and values[0] and v != values[0] else "" for v in values[1:]
        ]
        in_turn = [record.ratios(stage).get(name) for stage in stages[1:]]
        changes = [spread(ratio) if ratio else change for ratio, change in zip(in_turn, changes)]
        rows.append({"name": metric_name(name), "cells": cells, "changes": changes})
    return rows


def _harness_note(record: RunRecord) -> str:
    """How benchmarks were measured, in a line, with the paired error of the difference where examples are known."""
    details = [record.stages.get(stage, {}).get("details", {}) for stage in ("before", record.last)]
    key = next((key for key in details[0] if key.partition("/")[0] == "harness" and key in details[1]), None)
    if key is None:
        return ""
    a, b = details[0][key], details[1][key]
    limit = f", at most {a['limit']:g} examples a task" if a.get("limit") else ""
    shots = "zero-shot" if a.get("fewshot") == 0 else f"{a.get('fewshot')} examples in the prompt"
    text = f"lm-eval {a['lm_eval']}, {shots}, batch size {a['batch_size']}, {a['dtype']}{limit}."
    pairs = []
    for task, own in a["tasks"].items():
        mine, theirs = own.get("hits"), b["tasks"].get(task, {}).get("hits")
        if mine and theirs and len(mine) == len(theirs) > 1:
            change = [int(y) - int(x) for x, y in zip(mine, theirs)]
            mean = sum(change) / len(change)
            error = math.sqrt(sum((d - mean) ** 2 for d in change) / (len(change) - 1) / len(change))
            pairs.append(f"{task} {own['metric']} {100 * mean:+.1f} ± {100 * error:.1f}")
    of = "" if record.last == "after" else f" of the {STAGES[record.last]} model"
    return text + (f" Change{of} in points, paired by example: {'; '.join(pairs)}." if pairs else "")


def _windows_note(record: RunRecord) -> str:
    """How the text of every perplexity was cut, in a line: lengths, and the special tokens each window begins with."""
    said = {}
    for held in record.stages.values():
        for key, detail in held.get("details", {}).items():
            cut = detail.get("windows") if isinstance(detail, dict) else None
            if cut:
                begins = f"each begins with {' '.join(cut['before'])}" if cut["before"] else "without special tokens"
                said[key] = f"{key}: windows of {cut['length']} tokens, {begins}."
    return " ".join(said.values())


def worst(record: RunRecord, most: int = 5) -> list[dict[str, str]]:
    """The layers that fit their originals least, by the held-out loss, and how far training took each."""
    layers = finished_layers(record)
    names = [layer["layer"] for layer in layers]
    rows = sorted(layers, key=lambda row: -row["loss"])[:most]
    return [
        {
            "name": f"layer {label}" if (label := layer_label(row["layer"], names)).isdigit() else label,
            "initial": number(row["initial_loss"]),
            "loss": number(row["loss"]),
            "change": f"{row['loss'] / row['initial_loss'] - 1:+.0%}" if row["initial_loss"] else "",
        }
        for row in rows
    ]


def incidents(record: RunRecord) -> list[str]:
    """What did not go as planned while layers learned, a sentence for each."""
    said = []
    for event in record.events:
        about = {key: str(value) for key, value in event.items()}
        where, reason = about.get("weight") or about.get("layer", ""), about.get("reason", "")
        if event["event"] == "recovered":
            said.append(f"{where}: {reason}; it went back to an earlier state and learned more slowly from there.")
        elif event["event"] == "kept_initial":
            said.append(f"{where}: {reason}; its starting factors were kept.")
        elif event["event"] == "kept_dense":
            said.append(f"{where} stays dense: {reason}.")
    return said


def samples(record: RunRecord) -> list[dict[str, Any]]:
    """What the models wrote."""
    texts: dict[str, dict[str, Any]] = {}
    for stage, label in STAGES.items():
        for key, detail in record.stages.get(stage, {}).get("details", {}).items():
            if isinstance(detail, dict) and "completion" in detail:
                sample = texts.setdefault(key, {"prompt": detail["prompt"], "texts": []})
                sample["texts"].append((label, detail["completion"].strip()))
    return list(texts.values())


def environment_of(record: RunRecord) -> list[tuple[str, str]]:
    """What the run ran on."""
    start = next((event for event in record.events if event["event"] == "start"), {})
    shown = [("plugin", start.get("plugin")), ("machine", start.get("machine")), ("device", start.get("device"))]
    shown += [("threads", start.get("threads")), ("compute", record.versions.get("compute"))]
    shown += [(name, record.versions.get(name)) for name in ("lillama", "torch", "transformers")]
    return [(name, str(value)) for name, value in shown if value]


def how_to_load(record: RunRecord) -> str:
    """Python that opens the result."""
    place = record.path / PLACES[record.last]
    kind = (record.model.get("architectures") or ["AutoModelForCausalLM"])[0]
    return (
        f"import lillama  # teaches transformers the format\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("{place}")'
    )


def charts(record: RunRecord) -> dict[str, Any]:
    """The SVGs by name, in the order of the page. What cannot be drawn is named, with the reason, in its place."""
    from markupsafe import Markup

    drawn: dict[str, Any] = {}
    for name in [*(n for n in PLACED if n in FIGURES), *(n for n in FIGURES if n not in PLACED)]:
        try:
            svg = FIGURES.get(name)(record)
        except Exception as error:  # one chart must not take the report along
            drawn[name] = Markup(f"<p class=note>not drawn: {html.escape(f'{type(error).__name__}: {error}')}</p>")
            continue
        if svg:
            drawn[name] = Markup(svg)
    return drawn
