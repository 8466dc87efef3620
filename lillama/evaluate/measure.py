"""Evaluating a model that is on disk: the one way for a run, `lillama eval` and `lillama bench`."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama import host
from lillama.base import ranks
from lillama.base.rundir import RESOLVED, last_checkpoint
from lillama.checkpoint.open import find_plugin, open_model
from lillama.errors import LillamaError
from lillama.evaluate import strangers
from lillama.evaluate.context import Context, Later, evaluate
from lillama.evaluate.speed import weight_bytes
from lillama.recipe.evaluation import Evaluation
from lillama.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch


@dataclass
class Measured:
    """What evaluators found: numbers, and what a report wants besides."""

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


# A directory may come from anybody: whether code that came with its model may run, whoever opens it says.
UNTRUSTED = "model.trust_remote_code=false"


@dataclass(frozen=True)
class Wanted:
    """What is to be measured (a recipe's `evaluate:` section), and by which plugin besides.

    `trust` allows code that comes with the model to run. `recipe` is what the plugin's hooks are given: None for a
    model that no run made. `in_turn` false: without what a run measures of all its models in turn; true: that alone.
    """

    evaluators: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    trust: bool = False
    plugin: host.Plugin | None = None
    recipe: Recipe | None = None
    in_turn: bool | None = None

    @classmethod
    def of(cls, asked: Recipe | Evaluation, plugin: host.Plugin | None, in_turn: bool | None = None) -> Wanted:
        """What a recipe asks for, or overrides alone do."""
        recipe = asked if isinstance(asked, Recipe) else None
        return cls(asked.evaluate, asked.run.seed, asked.model.trust_remote_code, plugin, recipe, in_turn)


def measure(model: Any, place: str | Path, wanted: Wanted, device: torch.device) -> Measured:
    """Run the evaluators, and the plugin's, on a loaded model; `place` holds its tokenizer or processor."""
    hosts, plugin = host.get(), wanted.plugin
    model = put_on(model, device).eval()
    if plugin is not None:
        hosts.prepare(plugin, model, wanted.recipe)
    context = Context(reader_of(place, wanted.trust), str(device), wanted.seed)
    metrics = evaluate(model, wanted.evaluators, context, in_turn=wanted.in_turn)
    if plugin is not None and "evaluate" in plugin.hooks and not wanted.in_turn:
        metrics |= ranks.by_first(lambda: hosts.evaluate(plugin, model, wanted.recipe))
    return Measured(metrics, context.details)


def reader_of(place: str | Path, trust: bool) -> Later:
    """The tokenizer or processor of the model at `place`, once it is needed."""
    from lillama.pretrained.locate import read_processor

    return Later(lambda: read_processor(place, trust))


def put_on(model: Any, device: torch.device) -> Any:
    """`model` on `device`; where it does not fit there, on the cards that may be used and on the host (accelerate)."""
    from lillama.base.device import FILLED, cards_like, fits, free_memory

    weights = weight_bytes(model)
    if fits(weights, device):
        return model.to(device)
    room: dict[int | str, int] = {card.index: int(FILLED * (free_memory(card) or 0)) for card in cards_like(device)}
    return spread(model, room | {"cpu": 2 * weights})  # it is on the host now


def spread(model: Any, room: dict[int | str, int], folder: Path | None = None) -> Any:
    """`model` in the places that have `room`, in bytes; layers are brought to the first of them when they run.

    What has room nowhere goes into files in `folder`.
    """
    import accelerate

    whole = list(getattr(model, "_no_split_modules", None) or ())
    model.tie_weights()  # or a tied weight is counted, and placed, twice
    places = accelerate.infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    more = {} if folder is None else {"main_device": next(iter(room)), "offload_dir": str(folder)}
    return accelerate.dispatch_model(model, places, **more)


def asked_of(directory: Path, place: Path, path: str | None, overrides: Sequence[str]) -> Recipe | Evaluation:
    """What `place` is measured by: the recipe `path`, else the run's own in `directory`, else overrides alone."""
    data = [f"model.id={json.dumps(str(place))}", *overrides]
    if path:
        return Recipe.load(path, data)
    own = directory / RESOLVED
    if own.is_file():
        recipe = Recipe.load(own, [UNTRUSTED, *data])
        strangers.check(recipe, overrides, own)
        return recipe
    return Evaluation.parse({}, data)


def checkpoint_of(directory: Path) -> Path:
    """The last checkpoint in a run directory; anything else is taken for one itself."""
    own = (directory / "config.json").is_file()
    return directory if own else last_checkpoint(directory) or directory


def evaluate_directory(directory: Path, path: str | None, overrides: Sequence[str], device: str) -> Measured:
    """Evaluate a run's result (by its own recipe), a checkpoint or any model (by the recipe `path` or overrides)."""
    from lillama.base.device import choose

    place = checkpoint_of(directory)
    asked = asked_of(directory, place, path, overrides)
    wanted = Wanted.of(asked, None)
    plugin, auto = find_plugin(place, wanted.recipe, asked.plugin, wanted.trust)
    if not wanted.evaluators and not (plugin and "evaluate" in plugin.hooks):
        raise LillamaError(
            "there is nothing to measure",
            where="evaluate",
            hint="Give --tasks, --recipe FILE, or --set 'evaluate.perplexity={dataset: FILE}'.",
        )
    chosen = choose(device)
    chosen.activate()
    model = open_model(place, "auto", auto, wanted.trust)
    found = measure(model, place, replace(wanted, plugin=plugin), chosen.device)
    del model
    gc.collect()
    return found
