"""Evaluating a model that is on disk: the one way for a run, `lillama eval` and `lillama bench`."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama import host
from lillama.base.rundir import MODEL, RESOLVED
from lillama.checkpoint.open import opened, plugin_of
from lillama.errors import LillamaError

if TYPE_CHECKING:
    import torch

    from lillama.recipe.schema import Recipe


@dataclass
class Measured:
    """What evaluators found: numbers, and what a report wants besides."""

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def measure(
    model: Any,
    place: str | Path,
    recipe: Recipe,
    plugin: host.Plugin | None,
    device: torch.device,
    in_turn: bool | None = None,
) -> Measured:
    """Run the recipe's evaluators, and the plugin's, on a loaded model; `place` holds its tokenizer or processor.

    `in_turn` false: without those that a run measures of all its models in turn; true: those alone.
    """
    from lillama.evaluate import context as evaluate
    from lillama.pretrained.locate import read_processor

    hosts, reader = host.get(), read_processor(place, recipe.model.trust_remote_code)
    model.to(device).eval()
    if plugin is not None:
        hosts.prepare(plugin, model, recipe)
    context = evaluate.Context(reader, str(device), recipe.run.seed)
    metrics = evaluate.evaluate(model, recipe, context, in_turn=in_turn)
    if plugin is not None and "evaluate" in plugin.hooks and not in_turn:
        metrics |= hosts.evaluate(plugin, model, recipe)
    return Measured(metrics, context.details)


def recipe_for(directory: Path, place: Path, path: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe to evaluate `place` by: that of `path`, else the run's own in `directory`, else overrides alone."""
    from lillama.recipe.schema import Recipe

    data = [f"model.id={json.dumps(str(place))}", *overrides]
    if path or (directory / RESOLVED).is_file():
        return Recipe.load(path or directory / RESOLVED, data)
    base = {"model": {"id": str(place)}, "compress": {"reduction": 0.5}}
    return Recipe.parse(base | {"calibration": {"dataset": "-"}, "run": {"out": "-"}}, data)


def checkpoint_of(directory: Path) -> Path:
    """The checkpoint in a run directory; anything else is taken for one itself."""
    return directory / MODEL if (directory / MODEL / "config.json").is_file() else directory


def evaluate_directory(directory: Path, path: str | None, overrides: Sequence[str], device: str) -> Measured:
    """Evaluate a run's result (by its own recipe), a checkpoint or any model (by the recipe `path` or overrides)."""
    from lillama.base.device import choose

    place = checkpoint_of(directory)
    recipe = recipe_for(directory, place, path, overrides)
    plugin, auto = plugin_of(place, recipe)
    if not recipe.evaluate and not (plugin and "evaluate" in plugin.hooks):
        raise LillamaError(
            "there is nothing to measure",
            where="evaluate",
            hint="Give --tasks, --recipe FILE, or --set 'evaluate.perplexity={dataset: FILE}'.",
        )
    chosen = choose(recipe.run.model_copy(update={"device": device})).device
    model = opened(place, "auto", auto, recipe.model.trust_remote_code)
    found = measure(model, place, recipe, plugin, chosen)
    del model
    gc.collect()
    return found
