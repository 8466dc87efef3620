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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from lillama import hookspecs
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.errors import LillamaError, did_you_mean
from lillama.registry import Registries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lillama.recipe.schema import Recipe

GROUP = "lillama"
HOOKS = tuple(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "lillama_spec"))

log = logging.getLogger(__name__)


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

    def first(self, hook: str) -> bool:
        """Whether its `hook` is marked hookimpl(tryfirst=True)."""
        found = (function for name, function in _implementations(self.module) if name == hook)
        return any(function.lillama_impl.get("tryfirst") for function in found)


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
        self._registered = False

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

    def _call(self, plugin: Plugin, hook: str, **arguments: Any) -> Any:
        others = [other for other in self.manager.get_plugins() if other is not plugin.module]
        with _guard(plugin, hook):
            return self.manager.subset_hook_caller(hook, others)(**arguments)

    def check(self, name: str, where: str | None = "plugin") -> None:
        """Raise LillamaError unless a recipe can say `plugin: name`."""
        if name == "auto":
            return
        if name not in self.plugins:
            raise LillamaError(f"no plugin is called '{name}'", where=where, hint=did_you_mean(name, self.plugins))
        if failure := self.plugins[name].failure:
            raise LillamaError(f"the plugin {self.plugins[name]} {failure}", where=where)

    def _chosen(self, name: str) -> list[Plugin]:
        self.check(name)
        if name == "auto":
            return [plugin for plugin in self.plugins.values() if not plugin.failure]
        return [self.plugins[name]]

    def _failures(self) -> Iterator[str]:
        for plugin in self.plugins.values():
            if plugin.failure:
                yield f"The plugin {plugin} {plugin.failure}"

    def registered(self) -> None:
        """Let every plugin add to the registries, once."""
        if self._registered:
            return
        self._registered = True
        for plugin in self._chosen("auto"):
            try:
                self._call(plugin, "register", registries=Registries)
            except LillamaError as error:
                self.manager.unregister(name=plugin.name)
                plugin.failure = f"cannot be used: {error.what}"

    def layers(self, model: PreTrainedModel, recipe: Recipe) -> tuple[Plugin, list[Layer]]:
        """The plugin that knows `model`, and the layers it lists.

        A plugin that raises is passed over when another one claims the model. Raises LillamaError
        that says what would be needed when none does.
        """
        troubles = list(self._failures())
        # One that asks to be tried first knows a single model of a family that another serves.
        for plugin in sorted(self._chosen(recipe.plugin), key=lambda plugin: not plugin.first("enumerate_layers")):
            try:
                layers = self._layers_of(plugin, model, recipe)
            except LillamaError as error:
                if recipe.plugin != "auto":
                    raise
                log.warning("passed over: %s", error)
                troubles.append(str(error))
                continue
            if layers:
                return plugin, layers
        asked = ", ".join(sorted(p.name for p in self._chosen(recipe.plugin))) or "none"
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

    def _layers_of(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe) -> list[Layer]:
        found = self._call(plugin, "enumerate_layers", model=model, recipe=recipe)
        with _guard(plugin, "enumerate_layers"):
            layers = list(found or ())
            if stranger := next((layer for layer in layers if not isinstance(layer, Layer)), None):
                raise TypeError(f"it returned {stranger!r} where a lillama.Layer belongs")
        return layers

    def auto_class(self, config: Any, recipe: Recipe) -> Any | None:
        """The transformers auto class a plugin wants for this configuration, or None."""
        for plugin in self._chosen(recipe.plugin):
            try:
                wanted = self._call(plugin, "auto_class", config=config, recipe=recipe)
            except LillamaError as error:
                if recipe.plugin != "auto":
                    raise
                log.warning("passed over: %s", error)
                continue
            if wanted is not None:
                return wanted
        return None

    def configuration(self, found: dict[str, Any]) -> Any | None:
        """The configuration that any plugin makes of a model's config.json, or None."""
        for plugin in self._chosen("auto"):
            try:
                made = self._call(plugin, "configuration", config=found)
            except LillamaError as error:
                log.warning("passed over: %s", error)
                continue
            if made is not None:
                return made
        return None

    def own_configuration(self, where: str | os.PathLike[str], *, revision: str | None = None) -> Any | None:
        """The configuration that a plugin makes for a model, whose own code is not to be run then; or None."""
        from transformers import PreTrainedConfig

        raw, _ = PreTrainedConfig.get_config_dict(where, revision=revision)
        return None if "quantization_config" in raw else self.configuration(raw)

    def read_configuration(
        self, where: str | os.PathLike[str], *, revision: str | None = None, trust: bool = False
    ) -> Any:
        """The configuration of a model (directory, config.json or hub id): a plugin's, else as transformers reads it.

        Raises what transformers raises. A compressed checkpoint is always read by transformers.
        """
        from transformers import AutoConfig

        made = self.own_configuration(where, revision=revision)
        if made is not None:
            return made
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust)

    def shared_modules(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe) -> list[list[str]]:
        """The groups of modules that `plugin` says are one and the same."""
        groups = self._call(plugin, "shared_modules", model=model, recipe=recipe)
        with _guard(plugin, "shared_modules"):
            return [list(group) for group in groups or ()]

    def calibration_stream(
        self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe, progress: Progress | None = None
    ) -> Iterable[dict[str, Any]] | None:
        """The batches `plugin` provides for its model, or None for the host's own reader."""
        progress = progress or Progress()
        batches = self._call(plugin, "calibration_stream", model=model, recipe=recipe, progress=progress)
        return None if batches is None else _GuardedStream(plugin, batches)

    def finetune_data(
        self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe, progress: Progress
    ) -> list[dict[str, Any]] | None:
        """The examples `plugin` provides for fine-tuning, or None."""
        examples = self._call(plugin, "finetune_data", model=model, recipe=recipe, progress=progress)
        with _guard(plugin, "finetune_data"):
            return None if examples is None else list(examples)

    def evaluate(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe) -> dict[str, float]:
        """The metrics `plugin` adds for its model."""
        results = self._call(plugin, "evaluate", model=model, recipe=recipe)
        with _guard(plugin, "evaluate"):
            return {key: float(value) for result in results for key, value in result.items()}

    def prepare(self, plugin: Plugin, model: PreTrainedModel, recipe: Recipe) -> None:
        """Let `plugin` make its model ready to run."""
        self._call(plugin, "prepare", model=model, recipe=recipe)

    def doctor(self, plugin: Plugin) -> list[str]:
        """What `plugin` says of this machine; its failure, if it has one, is a line too."""
        try:
            return [str(line) for lines in self._call(plugin, "doctor") for line in lines]
        except LillamaError as error:
            return [str(error)]


@functools.cache
def get() -> Host:
    """The host of this process."""
    return Host()
