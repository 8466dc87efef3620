"""What a run measures of its original and of what became of it in turn, side by side: their speed.

Measured apart, minutes or hours of distillation between them, two models of one speed differed by 1.7 on a machine that
others used as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lillama import host
from lillama.checkpoint.write import file_bytes
from lillama.evaluate.context import Context, chosen_evaluators, whole_name
from lillama.evaluate.measure import Measured, Wanted, measure, reader_of
from lillama.evaluate.turns import Turns, give_back

if TYPE_CHECKING:
    import torch

    from lillama.recipe.schema import Recipe

HEADROOM = 1.1  # beside the weights, for what they compute


def divided(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's `evaluate`: what is measured of each model alone, and what of all of them in turn."""
    compared = {key for key, _, _ in chosen_evaluators(recipe.evaluate, in_turn=True)}
    given = recipe.model_dump(mode="json")["evaluate"]
    return (
        {key: options for key, options in given.items() if key not in compared},
        {key: options for key, options in given.items() if key in compared},
    )


def evaluate_in_turn(recipe: Recipe, turns: Turns, contexts: Mapping[str, Context]) -> dict[str, Measured]:
    """What the evaluators that compare find of the models of `contexts`, by their names, the original's first.

    Metrics have their whole names, those in `details[key]["ratio"]` too.
    """
    found = {stage: Measured() for stage in contexts}
    for key, function, options in chosen_evaluators(recipe.evaluate, in_turn=True):
        own = [context.of(key) for context in contexts.values()]
        measured = function.in_turn(turns, own, **options)  # type: ignore[attr-defined]
        for stage, context, metrics in zip(contexts, own, measured):
            found[stage].metrics |= {whole_name(key, name): float(value) for name, value in metrics.items()}
            if "ratio" in context.details:
                context.details["ratio"] = {whole_name(key, n): r for n, r in context.details["ratio"].items()}
            if context.details:
                found[stage].details[key] = context.details
    return found


def measure_in_turn(
    places: Mapping[str, Path],
    opened: Callable[[str], Any],
    recipe: Recipe,
    plugin: host.Plugin,
    device: torch.device,
) -> dict[str, Measured]:
    """Measure the models of the `places` (stage -> directory, the original's first), which `opened` loads, in turn.

    Where memory does not hold them all, each is measured alone, and no ratio is given.
    """
    if not _fit(places, device):
        return {stage: _alone(opened(stage), place, recipe, plugin, device) for stage, place in places.items()}
    models = [opened(stage) for stage in places]
    turns = Turns(models, device)
    for model in models:
        host.get().prepare(plugin, model.eval(), recipe)
    trust = recipe.model.trust_remote_code
    contexts = {s: Context(reader_of(place, trust), str(device), recipe.run.seed) for s, place in places.items()}
    found = evaluate_in_turn(recipe, turns, contexts)
    del models, turns, model
    gc.collect()
    return found


def _alone(model: Any, place: Path, recipe: Recipe, plugin: host.Plugin, device: torch.device) -> Measured:
    found = measure(model, place, Wanted.of(recipe, plugin, in_turn=True), device)
    del model
    gc.collect()
    return found


def _fit(places: Mapping[str, Path], device: torch.device) -> bool:
    """Whether the weights of all models fit into what memory is free, the device's counted."""
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        import torch

        give_back()
        free += torch.cuda.mem_get_info(device)[0]
    return HEADROOM * sum(map(file_bytes, places.values())) <= free
