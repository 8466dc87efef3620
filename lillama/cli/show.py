"""What a person sees: the plan before a run, the table after it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lillama.base.progress import clock
from lillama.errors import LillamaError
from lillama.plan.plan import Plan
from lillama.recipe.schema import Recipe
from lillama.report.record import PLACES, STAGES, by_kind, ratios_of
from lillama.report.words import millions, number, size, spread
from lillama.run.estimate import check_disk, estimate
from lillama.run.fewbits import checkpoint_bytes
from lillama.run.pipeline import Result
from lillama.run.prepare import Prepared

ERROR = "_stderr"  # what a metric's standard error is called after it


def plan(prepared: Prepared) -> RenderableType:
    """The plan as a table by kind of weight, with counts and estimates."""
    p, recipe = prepared.plan, prepared.recipe
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("weight", "left"), ("shape", "left"), ("ranks", "left"), ("parameters", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, rows in by_kind(p.to_dict()["weights"]).items():
        shape = " x ".join(map(str, rows[0]["shape"]))
        counts = Counter(row["rank"] for row in rows)
        ranks = ", ".join(
            f"{n} x {'dense' if r is None else r}"
            for r, n in sorted(counts.items(), key=lambda c: (c[0] is None, c[0]))
        )
        before, after = (sum(row[key] for row in rows) for key in ("parameters", "after"))
        tied = rows[0].get("tied")
        sizes = f"with {tied}" if tied else f"{millions(before)} -> {millions(after)}"
        table.add_row(name, shape, ranks, sizes)
    e = estimate(prepared.source, p, recipe, prepared.device)
    layers = sum(1 for layer in p.layers if p.changes(layer))
    compute = str(prepared.device.compute).removeprefix("torch.")
    lines = [
        f"{recipe.model.id}: {type(prepared.source.model).__name__}, plugin {prepared.plugin}",
        f"parameters {p.before:,} -> {p.after:,} ({p.reduction:.1%} removed), "
        f"{layers} of {len(p.layers)} layers, strategy {p.strategy}, {p.storage} storage, {recipe.compress.init} init",
        *(
            [f"bytes {size(p.budget.before)} -> {size(p.bytes or 0)}, at most {size(p.budget.most)}"]
            if p.budget
            else []
        ),
        *(
            [f"{p.strategy} decides during the run, by what it measures; these ranks are uniform ones of the same size"]
            if p.provisional
            else []
        ),
        f"distillation {recipe.distill.schedule}, loss {recipe.distill.loss}, on {prepared.device.device} in {compute}",
        *_neurons(prepared),
        *_few_bits(prepared),
        f"estimated: memory {size(e.memory)}, disk {size(e.disk)}, "
        + (f"about {clock(e.seconds)} for {e.tokens:,} tokens" if e.seconds else "time depends on calibration.tokens"),
    ]
    try:
        warning = check_disk(prepared, e)
    except LillamaError as error:  # the plan is of use elsewhere; a run is refused
        warning = f"not enough room: {error.what}"
    lines += [warning] if warning else []
    return Group(*(Text(line) for line in lines), Text(), table, Text())


def _neurons(prepared: Prepared) -> list[str]:
    """How many neurons may go, in a line."""
    share, mlps = prepared.recipe.compress.neurons, sum(len(layer.neurons) for layer in prepared.plan.layers)
    return [] if share is None else [f"neurons: up to {share:.0%} of those of each of {mlps} MLPs may go as well"]


def _bytes(plan: Plan) -> list[str]:
    """What a plan in bytes makes of them, in a line."""
    if plan.budget is None or plan.bytes is None:
        return []
    before, after, most = (size(count) for count in (plan.budget.before, plan.bytes, plan.budget.most))
    return [f"bytes {before} -> {after}, at most {most}"]


def _few_bits(prepared: Prepared) -> list[str]:
    """What `quantize` will do, in a line."""
    section, source = prepared.recipe.quantize, prepared.source
    if section is None:
        return []
    count = checkpoint_bytes(section, prepared.plan, source.model, source.dtype.itemsize)
    chosen = section.fitted and section.storage == "auto"
    held = f"about {size(count)}, by the forms that weights then take" if chosen else size(count)
    ends = f" (embedding and head {section.embedding})" if section.what == "all" else ""
    how = "compensated" if section.fitted else "nearest"
    if (budget := prepared.plan.budget) is not None:
        held = f"at most {size(budget.most)}"
    widths = " or ".join(map(str, section.widths))
    return [f"quantize {section.what} to {widths} bits{ends} in groups of {section.group_size}, {how}: {held}"]


def result(found: Result, recipe: Recipe) -> RenderableType:
    """The table after a run: before, after, and what came of that, each with its change; how to load the result."""
    m = found.metrics
    table = Table(box=None, pad_edge=False, header_style="bold")
    results = [stage for stage in PLACES if stage in m]
    labels = ["after", *(STAGES[stage] for stage in results[1:])]
    for column in ("", "before", *(column for label in labels for column in (label, "change"))):
        table.add_column(column, justify="left" if not column else "right")
    names = [name for name in (*m["before"], *m["after"]) if not name.endswith(ERROR)]
    table.columns[0].min_width = max(map(len, names), default=0)  # of two, changes give way on a narrow terminal
    for name, of, show in (("parameters", m["parameters"], lambda n: f"{n:,}"), ("weights on disk", m["bytes"], size)):
        cells = [show(of["before"])]
        for stage in results:
            after = of.get(stage, of["after"])
            cells += [show(after), f"{after / of['before'] - 1:+.1%}"]
        table.add_row(name, *cells)
    for name in dict.fromkeys(names):
        row = [_measured(m["before"], name)]
        for stage in results:
            known = ratios_of(found.details.get(stage, {})).get(name)
            change = spread(known) if known else _ratio(m["before"].get(name), m[stage].get(name))
            row += [_measured(m[stage], name), change]
        table.add_row(name, *row)
    parts: list[RenderableType] = [Text(), table, Text()]
    for key, detail in found.details.get("after", {}).items():
        if "prompt" in detail:
            stages = zip(("before", *labels), ("before", *results))
            texts = {label: found.details.get(stage, {}).get(key, {}).get("completion", "") for label, stage in stages}
            parts += _completions({"prompt": detail["prompt"]} | texts)
    total = clock(sum(m["seconds"].values()))
    parts.append(Text(f"took {total}, peak memory {size(m['peak_memory_bytes'])}; everything is in {recipe.run.out}"))
    parts.append(Text())
    parts.append(Text("import lillama", style="bold"))
    parts.append(Text(f"from transformers import {found.auto_class}", style="bold"))
    parts.append(Text(f'model = {found.auto_class}.from_pretrained("{found.path}")', style="bold"))
    return Group(*parts)


def _completions(texts: dict[str, str]) -> list[RenderableType]:
    """A prompt and what each model made of it, under their labels."""
    width = max(map(len, texts)) + 2
    return [*(Text.assemble((label.ljust(width), "bold"), text.strip()) for label, text in texts.items()), Text()]


def _measured(values: dict[str, float], name: str) -> str:
    """A metric, with its standard error where it has one."""
    error = values.get(f"{name}{ERROR}")
    return number(values.get(name), "inf") + (f" ± {error:.2g}" if error else "")


def _ratio(before: float | None, after: float | None) -> str:
    return f"x {after / before:.2f}" if before and after is not None and before != after else ""


def metrics(values: dict[str, float]) -> Table:
    """Metrics as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in values:
        if not name.endswith(ERROR):
            table.add_row(name, _measured(values, name))
    return table


def read_config(path: str) -> Any:
    """A transformers configuration from a config.json that stands alone."""
    from lillama.pretrained.locate import explained, read_configuration

    file = Path(path)
    if not file.is_file():
        raise LillamaError("there is no such file", where=path)
    with explained(f"the configuration '{path}'", "--config"):
        return read_configuration(file)


def bench(found: dict[str, Any]) -> RenderableType:
    """The comparison of two models' speeds as a table, with how much smaller the one is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("prompt", "phase", "original", "compressed", "ratio", "spread", "peak memory"):
        table.add_column(column, justify="left" if column in ("phase", "peak memory") else "right")
    for row in found["rows"]:
        for phase in ("prefill", "decode"):
            speeds = row.get(phase) or {}
            if not speeds:
                continue
            ratio = speeds.get("ratio")
            memory = row.get("peak_memory_bytes", {}) if phase == "prefill" else {}
            table.add_row(
                str(row["length"]),
                phase,
                *(f"{speeds[name]:,.1f}" if name in speeds else "" for name in ("original", "compressed")),
                f"x {ratio[0]:.2f}" if ratio else "",
                f"{ratio[1]:.2f} to {ratio[2]:.2f}" if ratio else "",
                ", ".join(size(value) for value in memory.values()),
            )
        if "note" in row:
            table.add_row(str(row["length"]), row["note"])
    sizes = [
        f"{name}: {model['parameters']:,} parameters, {size(model['weight_bytes'])}"
        for name, model in found["models"].items()
    ]
    parameters = [model["parameters"] for model in found["models"].values()]
    lines = [
        *sizes,
        f"parameters x {parameters[1] / parameters[0]:.2f}; {found['machine']}, {found['threads']} threads, "
        f"{found['dtype']}; tokens per second of {found['batch_size']} prompts at once, medians of {found['repeats']}",
    ]
    return Group(*(Text(line) for line in lines), Text(), table)
