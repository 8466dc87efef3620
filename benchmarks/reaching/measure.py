"""What becomes of one class: built, planned, at full rank, by the default recipe. Run in a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama import testing
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe
from lillama.run import pipeline, prepare
from reaching import build, classes, watch

EQUAL = 1e-5  # of the largest logit, or of one
STAGES = ("builds", "forward", "reloads", "plan", "full", "default")


def measure(one: classes.Class, directory: Path, plugin: str = "auto") -> dict[str, Any]:
    """The findings on a class, stage by stage: each is `yes` or says what went wrong; later ones may be absent."""
    found: dict[str, Any] = {"kind": one.kind, "model_type": one.model_type, "class": one.name}
    start = time.monotonic()
    with contextlib.suppress(_Failed):
        _stages(one, directory, plugin, found)
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


class _Failed(Exception):  # noqa: N818  ends the stages
    pass


@contextlib.contextmanager
def _stage(found: dict[str, Any], name: str, goes_on: bool = False) -> Any:
    """Keep what a stage says; an exception becomes its finding."""
    try:
        found[name] = "yes"
        found["at"] = name  # where a process that is killed was
        _note(found)
        yield
    except Exception as error:
        found[name] = reason(error)
        found.setdefault("traces", {})[name] = deepest(error)
        found.setdefault("defects", []).extend([] if isinstance(error, LillamaError) else [name])
        if not goes_on:
            raise _Failed from None
    finally:
        found["at"] = None if found[name] == "yes" else name
        _note(found)


_NOTES: list[Path] = []  # where findings are kept as they come


def keep_notes(path: Path) -> None:
    """Write the findings to `path` after every stage, so that a process that dies leaves what it knew."""
    _NOTES[:] = [path]


def _note(found: dict[str, Any]) -> None:
    for path in _NOTES:
        path.write_text(json.dumps(found))


def _stages(one: classes.Class, directory: Path, plugin: str, found: dict[str, Any]) -> None:
    original = directory / "model"
    with _stage(found, "builds"):
        model_class, _ = one.find()
        model = build.build(model_class, one.configuration())
        found["parameters"] = sum(p.numel() for p in model.parameters())
    with _stage(found, "forward"):
        inputs = build.find_inputs(model)
        found["inputs"] = {name: list(value.shape) for name, value in inputs.items()}
    expected = build.run(model, inputs)
    found["rounding"] = build.rounding(model, inputs, expected)
    with _stage(found, "reloads", goes_on=True):
        model.save_pretrained(original)
        again = model_class.from_pretrained(original, dtype=torch.float32).eval()
        found["reloads"] = differs(build.run(again, inputs), expected)
        del again
    batches = build.batches(model, inputs)
    with _stage(found, "plan"):
        prepared = prepare.prepare(testing.recipe_for(original, directory / "full", plugin))
        found |= described(prepared)
    streams = watch.Streams(model, found["blocks"], batches[0])
    del model
    with _stage(found, "full", goes_on=True):
        logits = _full(prepared, original, directory / "full", plugin, batches, inputs)
        found["full"] = differs(logits, expected, 2 * found["rounding"])
    with _stage(found, "default", goes_on=True):
        found["default"] = _default(original, directory / "default", plugin, batches, inputs, streams, found)
    if found["default"] == "yes":
        found["streams"] = streams.verdict()


def described(prepared: prepare.Prepared) -> dict[str, Any]:
    """The plugin, the blocks, and which share of their matrices it offers."""
    model = prepared.source.model
    blocks = [layer for layer in prepared.layers if layer.kind == "block"]
    inside = {id(p): p.numel() for b in blocks for p in model.get_submodule(b.name).parameters() if p.ndim >= 2}
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    embedded |= {id(p) for p in head.parameters()} if head is not None else set()
    whole = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embedded)
    offered = _offered(model, [weight for block in blocks for weight in block.weights])
    names = [b.name for b in blocks]
    return {
        "plugin": prepared.plugin.name,
        "blocks": names,
        "offered": offered,
        "coverage": round(offered / max(sum(inside.values()), 1), 3),
        "of_model": round(offered / max(whole, 1), 3),
        "groups": _groups(blocks[-1]) if blocks else "",
        "left": _left(model, blocks),
    }


def _offered(model: torch.nn.Module, weights: list[Any]) -> int:
    """How many numbers `weights` have, such as share one matrix counted once."""
    modules = dict(model.named_modules())
    found = {id(getattr(modules.get(weight.name), "weight", weight)): weight.parameters for weight in weights}
    return sum(found.values())


def _groups(block: Any) -> str:
    groups: dict[Any, list[str]] = {}
    for weight in block.weights:
        groups.setdefault(weight.group or weight.name, []).append(weight.name.removeprefix(f"{block.name}."))
    return " | ".join("+".join(names) for names in groups.values())


def _left(model: Any, blocks: list[Any]) -> dict[str, int]:
    """The largest parameters of blocks that are not offered: numbers by the class and name that hold them."""
    offered = {weight.name for block in blocks for weight in block.weights}
    left: dict[str, int] = {}
    for block in blocks:
        for name, module in model.get_submodule(block.name).named_modules():
            whole = f"{block.name}.{name}".rstrip(".")
            if any(f"{whole}.".startswith(f"{one}.") or one.startswith(f"{whole}.gate") for one in offered):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    label = f"{type(module).__name__}.{key}"
                    left[label] = left.get(label, 0) + parameter.numel()
    return dict(sorted(left.items(), key=lambda item: -item[1])[:4])


def _full(
    prepared: prepare.Prepared,
    original: Path,
    out: Path,
    plugin: str,
    batches: testing.Batches,
    inputs: build.Inputs,
) -> Tensor:
    plan = testing.full_rank_plan(prepared.layers, prepared.source.parameters, "factors")
    changes = {"compress.init": "svd", "compress.storage": "factors", "distill.epochs": 0}
    again = prepare.prepare(testing.recipe_for(original, out, plugin, changes))
    result = pipeline.Run(replace(again, plan=plan), Progress(), batches=batches).execute()
    return build.run(load(result.path).eval(), inputs)


def _default(
    original: Path,
    out: Path,
    plugin: str,
    batches: testing.Batches,
    inputs: build.Inputs,
    streams: watch.Streams,
    found: dict[str, Any],
) -> str:
    settings: dict[str, Any] = {
        "model": {"id": str(original)},
        "plugin": plugin,
        "compress": {"reduction": 0.2},
        "calibration": {"dataset": "given"},
        # Streams are compared with the model's own, in the same arithmetic whatever the machine.
        "run": {"out": str(out), "device": "cpu", "compute": "float32"},
    }
    try:
        prepared = prepare.prepare(Recipe.parse(settings))
    except LillamaError as error:
        if "no ranks reach" not in error.what:
            raise
        # Small models are mostly what is no block: a fifth of the blocks' weights will do.
        found["of"] = settings["compress"]["of"] = "weights"
        prepared = prepare.prepare(Recipe.parse(settings))
    with streams.of(prepared.source.model):
        result = pipeline.Run(prepared, Progress(), batches=batches).execute()
    loaded = load(result.path).eval()
    actual = sum(p.numel() for p in loaded.parameters())
    if actual != result.plan.after:
        return f"{actual} parameters where {result.plan.after} were planned"
    logits = build.run(loaded, inputs)
    shutil.rmtree(out, ignore_errors=True)
    return "yes" if bool(logits.isfinite().all()) else "the logits are not finite"


def differs(found: Tensor, expected: Tensor, rounding: float = 0.0) -> str:
    """`yes` where two results are equal, else how far they are apart.

    To 1e-5, of the largest where that is more than one; or to `rounding`, where the model itself is no exacter.
    """
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} in place of {list(expected.shape)}"
    worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    return "yes" if worst <= max(EQUAL, rounding) else f"differs by {worst:.1e}"


def reason(error: BaseException) -> str:
    """One line for an error: of Lillama's own what it says, of others their type too."""
    if isinstance(error, LillamaError):
        passed_over = [line.strip() for line in (error.hint or "").splitlines()[1:]]
        if error.what.startswith("no plugin knows") and passed_over:
            return f"refused: {passed_over[-1]}"  # what the last one asked, which takes any model, had to say
        where = f"{error.where}: " if error.where else ""
        return f"{where}{error.what}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def deepest(error: BaseException) -> list[str]:
    """The innermost lines of an error's traceback, those of torch left out; then those of what caused it."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [f for f in frames if "/torch/" not in f.filename or "/nn/modules/" in f.filename][-4:]
    lines = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}: {f.line}" for f in shown]
    if error.__cause__ is not None:
        return [*lines, f"caused by {reason(error.__cause__)}", *deepest(error.__cause__)]
    return lines
