"""The plugin host: finds plugins, guards them, and asks them.

A plugin that cannot be imported, misspells a hook or raises in one is named together with its
distribution and version; recipes that do not need it still run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from lillama import hookspecs, registry
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.errors import LillamaError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lillama.recipe.schema import Recipe

GROUP = "lillama"
HOOKS = tuple(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "lillama_spec"))

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass
class Plugin:
    """One installed plugin, or what kept it from being used (`failure`)."""

    name: str
    distribution: str
    version: str
    module: Any = None
    failure: str | None = None
    details: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def hooks(self) -> list[str]:
        """Names of the hooks it implements."""
        implemented = {name for name, _ in _implementations(self.module)}
        return [hook for hook in HOOKS if hook in implemented]

    def turn(self, hook: str) -> int:
        """When it is asked: 0 where its `hook` is marked hookimpl(tryfirst=True), 2 where trylast=True, else 1."""
        marks = [function.lillama_impl for name, function in _implementations(self.module) if name == hook]
        if any(mark.get("tryfirst") for mark in marks):
            return 0
        return 2 if any(mark.get("trylast") for mark in marks) else 1


def _implementations(module: Any) -> Iterator[tuple[str, Any]]:
    """The functions of a plugin that are marked with `hookimpl`, by the name of their hook."""
    for name in dir(module):
        function = getattr(module, name, None)
        options = getattr(function, "lillama_impl", None)
        if isinstance(options, dict):
            yield options.get("specname") or name, function


@contextmanager
def _guard(plugin: Plugin, hook: str) -> Iterator[None]:
    """Turns whatever a plugin raises into an error that names it."""
    try:
        yield
    except LillamaError as error:
        if error.where is None:
            error.where = f"plugin {plugin}"
        raise
    except Exception as error:
        raise LillamaError(
            f"the plugin {plugin} failed in {hook}: {type(error).__name__}: {error}",
            hint="Report this to the plugin's author; --debug shows the traceback.",
        ) from error


class _GuardedStream:
    """The batches of a plugin: a generator raises only when it is read."""

    def __init__(self, plugin: Plugin, batches: Iterable[Any]) -> None:
        self.plugin, self.batches = plugin, batches

    def __iter__(self) -> Iterator[Any]:
        with _guard(self.plugin, "calibration_stream"):
            yield from self.batches


class Host:
    """All plugins of this environment, loaded once."""

    def __init__(self, entry_points: Any = None, only: list[str] | None = None) -> None:
        """`entry_points` default to the installed ones, `only` to the names in LILLAMA_PLUGINS."""
        if only is None:
            only = [name.strip() for name in os.environ.get("LILLAMA_PLUGINS", "").split(",") if name.strip()]
        found = list(importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points)
        self.manager = pluggy.PluginManager("lillama")
        self.manager.add_hookspecs(hookspecs)
        self.plugins: dict[str, Plugin] = {}
        for point in sorted(found, key=lambda point: point.name):
            if not only or point.name in only:
                self._load(point)
        if missing := [name for name in only if name not in self.plugins]:
            raise LillamaError(
                f"no plugin is called '{missing[0]}'",
                where="LILLAMA_PLUGINS",
                hint=did_you_mean(missing[0], [point.name for point in found]),
            )

    def _load(self, point: importlib.metadata.EntryPoint) -> None:
        dist = point.dist
        plugin = Plugin(point.name, dist.name if dist else "?", dist.version if dist else "?")
        if taken := self.plugins.get(point.name):
            plugin.failure = f"has the name of {taken}, which is used; uninstall one of them"
            self.plugins[str(plugin)] = plugin
            return
        self.plugins[point.name] = plugin
        try:
            plugin.module = point.load()
            self.manager.register(plugin.module, point.name)
            self.manager.check_pending()
            if not plugin.hooks:
                plugin.failure = "implements no hook. Mark its functions with lillama.hookimpl"
        except pluggy.PluginValidationError as error:
            plugin.failure = self._explain_hook(plugin.module) or " ".join(str(error).split())
        except (Exception, SystemExit) as error:
            # Whatever a stranger's module raises must not stop recipes that do not need it.
            plugin.failure = f"cannot be imported: {type(error).__name__}: {error}"
            plugin.details = traceback.format_exc()
        if plugin.failure and self.manager.has_plugin(point.name):
            self.manager.unregister(name=point.name)

    @staticmethod
    def _explain_hook(module: Any) -> str | None:
        for name, _ in _implementations(module):
            if name not in HOOKS:
                return f"implements a hook that does not exist: '{name}'. {did_you_mean(name, HOOKS)}"
        return None

    def _ask(self, plugin: Plugin, hook: str, check: Callable[[Any], Answer], **arguments: Any) -> Answer:
        """What `plugin` says to `hook`, as `check` takes it; whatever either raises names the plugin."""
        others = [other for other in self.manager.get_plugins() if other is not plugin.module]
        with _guard(plugin, hook):
            return check(self.manager.subset_hook_caller(hook, others)(**arguments))

    def _first(
        self, name: str, hook: str, check: Callable[[Any], Answer | None], troubles: list[str], **arguments: Any
    ) -> tuple[Plugin, Answer] | None:
        """The first plugin with an answer, and that; one that raises is passed over unless the recipe names it."""
        # One that asks to be tried first knows a single model of a family that another serves; the last, any model.
        for plugin in sorted(self._chosen(name), key=lambda plugin: plugin.turn(hook)):
            try:
                answer = self._ask(plugin, hook, check, **arguments)
            except LillamaError as error:
                if name != "auto":
                    raise
                log.warning("passed over: %s", error)
                troubles.append(str(error))
                continue
            if answer is not None:
                return plugin, answer
        return None

    def _chosen(self, name: str) -> list[Plugin]:
        registry.check_plugin(self.plugins, name)
        if name == "auto":
            return [plugin for plugin in self.plugins.values() if not plugin.failure]
        return [self.plugins[name]]

    def register(self) -> None:
        """Let every plugin add to the registries; one that fails is not used any more."""
        for plugin in self._chosen("auto"):
            try:
                self._ask(plugin, "register", _anything, registries=registry.Registries)
            except LillamaError as error:
                self.manager.unregister(name=plugin.name)
                plugin.failure = f"cannot be used: {error.what}{f'. {error.hint}' if error.hint else ''}"
                plugin.details = traceback.format_exc()

    def layers(self, model: PreTrainedModel, recipe: Recipe | None, name: str = "auto") -> tuple[Plugin, list[Layer]]:
        """The plugin that knows `model`, and the layers it lists; where there is no recipe, `name` may choose it.

        A plugin that raises is passed over when another one claims the model. Raises LillamaError
        that says what would be needed when none does.
        """
        name = recipe.plugin if recipe else name
        troubles = [f"The plugin {plugin} {plugin.failure}" for plugin in self.plugins.values() if plugin.failure]
        arguments = {"model": model, "recipe": recipe, "asked": name != "auto"}
        if found := self._first(name, "enumerate_layers", _layers, troubles, **arguments):
            return found
        asked = ", ".join(sorted(p.name for p in self._chosen(name))) or "none"
        raise LillamaError(
            f"no plugin knows {type(model).__name__} (model_type '{model.config.model_type}'); asked: {asked}",
            where="plugin",
            hint="\n  ".join(
                [
                    "Install a plugin whose enumerate_layers lists this model's layers, or write one "
                    "(about 20 lines, docs/plugins.md).",
                    *troubles,
                ]
            ),
        )

    def auto_class(self, config: Any, recipe: Recipe | None, name: str = "auto") -> Any | None:
        """The transformers auto class a plugin wants for this configuration, or None."""
        name = recipe.plugin if recipe else name
        found = self._first(name, "auto_class", _anything, [], config=config, recipe=recipe)
        return found and found[1]

    def configuration(self, raw: dict[str, Any]) -> Any | None:
        """The configuration that any plugin makes of a model's config.json, or None."""
        found = self._first("auto", "configuration", _anything, [], config=raw)
        return found and found[1]

    def shared_modules(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe | None) -> list[list[str]]:
        """The groups of modules that `plugin` says are one and the same."""

        def lists(groups: Any) -> list[list[str]]:
            return [list(group) for group in groups or ()]

        return self._ask(plugin, "shared_modules", lists, model=model, recipe=recipe)

    def calibration_stream(
        self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe, progress: Progress | None = None
    ) -> Iterable[dict[str, Any]] | None:
        """The batches `plugin` provides for its model, or None for the host's own reader."""

        def guarded(batches: Any) -> _GuardedStream | None:
            return None if batches is None else _GuardedStream(plugin, batches)

        arguments = {"model": model, "recipe": recipe, "progress": progress or Progress()}
        return self._ask(plugin, "calibration_stream", guarded, **arguments)

    def finetune_data(
        self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe, progress: Progress
    ) -> list[dict[str, Any]] | None:
        """The examples `plugin` provides for fine-tuning, or None."""

        def listed(examples: Any) -> list[dict[str, Any]] | None:
            return None if examples is None else list(examples)

        return self._ask(plugin, "finetune_data", listed, model=model, recipe=recipe, progress=progress)

    def evaluate(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe | None) -> dict[str, float]:
        """The metrics `plugin` adds for its model."""

        def numbers(results: Any) -> dict[str, float]:
            return {key: float(value) for result in results for key, value in result.items()}

        return self._ask(plugin, "evaluate", numbers, model=model, recipe=recipe)

    def prepare(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe | None) -> None:
        """Let `plugin` make its model ready to run."""
        self._ask(plugin, "prepare", _anything, model=model, recipe=recipe)

    def doctor(self, plugin: Plugin) -> list[str]:
        """What `plugin` says of this machine; its failure, if it has one, is a line too."""
        try:
            return self._ask(plugin, "doctor", lambda results: [str(line) for lines in results for line in lines])
        except LillamaError as error:
            return [str(error)]


def _anything(answer: Any) -> Any:
    return answer


def _layers(answer: Any) -> list[Layer] | None:
    layers = list(answer or ())
    if stranger := next((layer for layer in layers if not isinstance(layer, Layer)), None):
        raise TypeError(f"it returned {stranger!r} where a lillama.Layer belongs")
    return layers or None


@functools.cache
def get() -> Host:
    """The host of this process."""
    return Host()


def register_all() -> None:
    """Fill the registries with what plugins bring: called before the first look-up (registry.discover_with)."""
    found = get()
    found.register()
    registry.PLUGINS.fill(found.plugins)
