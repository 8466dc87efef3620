"""Live tracking: what goes to events.jsonl also goes to wandb or trackio (`run.track`), for those who watch there.

Fine-tuning uses transformers' own integrations, which log to the run that is open here.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from lillama.base.progress import Progress
    from lillama.base.rundir import RunDirectory
    from lillama.recipe.schema import Recipe

PROJECT = "lillama"


@contextlib.contextmanager
def tracked(recipe: Recipe, directory: RunDirectory, progress: Progress) -> Iterator[None]:
    """Send the run's events on while the block lasts.

    Both trackers have one interface: init, log, finish. One that fails is left out from then on, and said so.
    """
    config = recipe.model_dump(mode="json")
    with contextlib.ExitStack() as stack:
        for tracker, module in modules(recipe).items():
            if not _worked(tracker, progress, module.init, project=PROJECT, name=name(recipe), config=config):
                continue
            stack.callback(_worked, tracker, progress, module.finish)
            directory.listeners.append(_listener(tracker, module, directory, progress))
        stack.callback(directory.listeners.clear)
        yield


def name(recipe: Recipe) -> str:
    """What the trackers call a run."""
    return Path(recipe.run.out).name


def modules(recipe: Recipe) -> dict[str, Any]:
    """The recipe's trackers, imported. Raises LillamaError for one that is not installed."""
    return {tracker: _module(tracker) for tracker in recipe.run.track}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LillamaError(
            f"{name} is not installed", where="run.track", hint="Install it: pip install 'lillama[track]'."
        ) from error


def _listener(name: str, module: Any, directory: RunDirectory, progress: Progress) -> Callable[..., None]:
    def listen(kind: str, data: dict[str, Any]) -> None:
        values = numbers(kind, data)
        if not values:
            return
        if not _worked(name, progress, module.log, values):
            directory.listeners.remove(listen)

    return listen


def _worked(name: str, progress: Progress, function: Callable[..., Any], /, *given: Any, **options: Any) -> bool:
    """Call a tracker; what it raises (nobody is logged in, the server is away) is said and must not cost the run."""
    try:
        function(*given, **options)
    except Exception as error:
        progress.say(f"{name} is left out: {type(error).__name__}: {error}")
        return False
    return True


def numbers(kind: str, data: dict[str, Any]) -> dict[str, float]:
    """The numbers of an event under names that make charts: LAYER/held_out_loss, curve/perplexity."""
    prefix = data.get("layer") or data.get("stage") or kind
    return {
        f"{prefix}/{key}": value
        for key, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
