"""Named choices of a recipe: what `strategy: bottom` or `objective: mse` stands for, and where each lives.

A registry maps a name to a function (or a class), or to "module:attribute" so that listing and checking names
imports nothing heavy. Plugins add to them in the hook `register`, before the first look-up of any registry.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, Protocol, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Strict, create_model, field_validator
from pydantic_core import PydanticCustomError

from lillama.errors import LillamaError, did_you_mean
from lillama.signature import Call, parameters

_SCALARS = {bool, int, float, str, types.NoneType}

Target = TypeVar("Target", bound=Callable[..., Any])  # a function, or a class


class Options(BaseModel):
    """Frozen settings that refuse keys they do not know and numbers that are not finite, or beyond 64 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _sane(cls, value: Any) -> Any:
        # 1e6 is a float in YAML, and what people write for a million.
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            value = int(value)
        if any(isinstance(one, int) and abs(one) >= 2**63 for one in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("number_too_large", "A whole number should fit into 64 bits")
        if isinstance(value, str) and "\0" in value:  # no file name and no terminal takes it
            raise PydanticCustomError("text_with_nul", "A text without NUL characters is wanted")
        return value


class _Discovery:
    """The one call that fills the registries, made before anything is looked up in them."""

    def __init__(self) -> None:
        self.target = ""
        self.begun = False

    def ensure(self) -> None:
        """Make the call unless it was made, or is being made: what it calls may look things up itself."""
        if self.begun or not self.target:
            return
        self.begun = True
        try:
            _imported(self.target)()
        except BaseException:
            self.begun = False  # whoever asks next is told as well
            raise


_DISCOVERY = _Discovery()


def discover_with(target: str) -> None:
    """Have "module:function" add what plugins bring, once, before the next look-up."""
    _DISCOVERY.target, _DISCOVERY.begun = target, False


def discover_again() -> None:
    """Have the next look-up make that call once more: for tests that change which plugins there are."""
    _DISCOVERY.begun = False


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Generic[Target]):
    """A named set of interchangeable functions or classes. `kind` is the word used in errors.

    `call` says how they are called; a plugin's that does not fit is refused when it is added, or where it is given
    as "module:attribute", when a recipe names it.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None, call: Call | None = None) -> None:
        self.kind = kind
        self.call = call
        self._builtin = frozenset(builtin or {})
        self._targets: dict[str, str | Target] = dict(builtin or {})

    def add(self, name: str, target: str | Target) -> None:
        """Register `target` (a function, or "module:function") as `name`; another's name is an error."""
        if not (callable(target) or (isinstance(target, str) and ":" in target)):
            raise LillamaError(
                f"the {self.kind} '{name}' is neither a function nor 'module:function': {target!r}",
                hint="Pass the function itself.",
            )
        if self._targets.get(name, target) != target:
            raise LillamaError(f"the {self.kind} '{name}' is already registered", hint="Choose another name.")
        if callable(target):
            self._fits(name, target)
        self._targets[name] = target

    def check(self, name: str, where: str | None = None) -> None:
        """Raise an error that names the nearest choice unless `name` is registered and can be called as it will be."""
        _DISCOVERY.ensure()
        if name not in self._targets:
            raise LillamaError(
                f"no {self.kind} is called '{name}'", where=where, hint=did_you_mean(name, self._targets)
            )
        # Functions were looked at when they were added; built-in ones fit, and importing them may take seconds.
        if self.call and isinstance(self._targets[name], str) and name not in self._builtin:
            self._fits(name, self._load(name), where)

    def get(self, name: str) -> Target:
        """What is registered as `name`, imported on first use; LillamaError where that fails."""
        self.check(name)
        return self._load(name)

    def needs(self, name: str) -> frozenset[str]:
        """The names of the parameters of what is registered as `name`: a function says by them what it is given."""
        return frozenset(parameter.name for parameter in parameters(self.get(name)))

    def _load(self, name: str) -> Target:
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        try:
            found: Target = _imported(target)
        except (ImportError, AttributeError) as error:
            raise LillamaError(
                f"the {self.kind} '{name}' cannot be loaded from {target}: {error}",
                hint="Install what it needs, or choose another.",
            ) from error
        return found

    def _fits(self, name: str, target: Target, where: str | None = None) -> None:
        if self.call:
            self.call.check(f"the {self.kind} '{name}'", target, where)

    def options(self, name: str) -> type[BaseModel]:
        """The schema of a function's keyword-only parameters: a function's signature is its schema.

        `Annotated[int, Field(description=...)]` describes and bounds an option.
        """
        function = inspect.unwrap(self.get(name))
        scope = getattr(function, "__globals__", {})
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                default = ... if parameter.default is parameter.empty else parameter.default
                fields[parameter.name] = (self._type(name, parameter, scope), default)
        return create_model(f"{name}_options", __base__=Options, __doc__=inspect.getdoc(function), **fields)

    def _type(self, name: str, parameter: inspect.Parameter, scope: dict[str, Any]) -> Any:
        # One by one: positional parameters may be annotated with what is imported for type checkers only.
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, scope)
            except NameError as error:
                raise LillamaError(
                    f"the type of option '{parameter.name}' of the {self.kind} '{name}' is unknown: {error}",
                    hint="Import it where the function is defined, outside TYPE_CHECKING.",
                ) from error
        return Annotated[annotation, Strict()] if _is_scalar(annotation) else annotation

    def __iter__(self) -> Iterator[str]:
        _DISCOVERY.ensure()
        return iter(sorted(self._targets))

    def __contains__(self, name: str) -> bool:
        _DISCOVERY.ensure()
        return name in self._targets

    def __len__(self) -> int:
        _DISCOVERY.ensure()
        return len(self._targets)


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    union = get_origin(annotation) in (Union, types.UnionType)
    return set(get_args(annotation) if union else [annotation]) <= _SCALARS


class Found(Protocol):
    """What is asked of an installed plugin here; the host has more of it."""

    @property
    def failure(self) -> str | None:
        """What keeps it from being used."""


class Plugins:
    """The names that `plugin:` in a recipe may have: "auto", and the plugins that were found and can be used."""

    def __init__(self) -> None:
        self._found: Mapping[str, Found] = {}

    def fill(self, found: Mapping[str, Found]) -> None:
        """Take over what the host found."""
        self._found = found

    def check(self, name: str, where: str | None = None) -> None:
        """LillamaError unless a recipe can say `plugin: name`."""
        _DISCOVERY.ensure()
        check_plugin(self._found, name, where)

    def __iter__(self) -> Iterator[str]:
        _DISCOVERY.ensure()
        return iter(self._found)

    def __contains__(self, name: str) -> bool:
        _DISCOVERY.ensure()
        return name in self._found


def check_plugin(found: Mapping[str, Found], name: str, where: str | None = "plugin") -> None:
    """LillamaError unless `name` is "auto" or that of a plugin among `found` which can be used."""
    if name == "auto":
        return
    if name not in found:
        raise LillamaError(f"no plugin is called '{name}'", where=where, hint=did_you_mean(name, found))
    if failure := found[name].failure:
        raise LillamaError(f"the plugin {found[name]} {failure}", where=where)


STRATEGIES: Registry[Callable[..., Any]] = Registry(
    "strategy",
    {
        "bottom": "lillama.plan.strategies:bottom",
        "top": "lillama.plan.strategies:top",
        "uniform": "lillama.plan.strategies:uniform",
        "fisher": "lillama.plan.fisher:fisher",
    },
    Call(3, frozenset({"spectra"})),  # layers, remove, compress
)
INITIALISERS: Registry[Callable[..., Any]] = Registry(
    "initialiser",
    {
        "svd": "lillama.factorise.initialisers:svd",
        "random": "lillama.factorise.initialisers:random",
        "whitened": "lillama.factorise.initialisers:whitened",
        "compensated": "lillama.factorise.initialisers:compensated",
        "asvd": "lillama.factorise.initialisers:asvd",
        "fisher": "lillama.factorise.initialisers:fisher",
    },
    # W, rank
    Call(2, frozenset({"gram", "output_gram", "cross", "generator", "input_fisher", "output_fisher"})),
)
OBJECTIVES: Registry[Callable[..., Any]] = Registry(
    "objective",
    {
        "l1_logcos": "lillama.distill.losses:l1_logcos",
        "mse": "lillama.distill.losses:mse",
        "normalised_mse": "lillama.distill.losses:normalised_mse",
    },
    Call(2),  # student, teacher
)
LOSSES: Registry[Callable[..., Any]] = Registry(
    "loss",
    {
        "teacher": "lillama.distill.losses:teacher",
        "student": "lillama.distill.losses:student",
        "teacher+student": "lillama.distill.losses:teacher_student",
    },
    Call(0, frozenset({"on_teacher", "on_student"})),
)
SCHEDULES: Registry[Callable[..., Any]] = Registry(
    "schedule",
    {
        "concurrent": "lillama.distill.concurrent:concurrent",
        "sequential": "lillama.distill.sequential:sequential",
    },
)
STORAGES: Registry[type[Any]] = Registry(
    "storage",
    {
        "factors": "lillama.lowrank.factors:FactorStorage",
        "pivoted": "lillama.lowrank.pivoted:PivotedStorage",
    },
)
# Asked in turn what a data set's name stands for: those of plugins first, then in this order.
READERS: Registry[Callable[..., Any]] = Registry(
    "data reader",
    {
        "package": "lillama.data.package:read_package",
        "files": "lillama.data.files:read_files",
        "hub": "lillama.data.hub:read_hub",
    },
    Call(4),  # dataset, config, split, where
)
EXPORTS: Registry[Callable[..., Any]] = Registry(
    "export",
    {
        "dense": "lillama.checkpoint.export:export_dense",
        "standalone": "lillama.checkpoint.standalone:export_standalone",
    },
    Call(2, frozenset({"trust_remote_code"})),  # directory of the checkpoint, directory to write
)
FIGURES: Registry[Callable[..., Any]] = Registry(
    "report figure",
    {
        "ranks": "lillama.report.figures:ranks",
        "losses": "lillama.report.figures:losses",
        "layers": "lillama.report.figures:layers",
        "convergence": "lillama.report.figures:convergence",
        "finetuning": "lillama.report.figures:finetuning",
        "benchmarks": "lillama.report.figures:benchmarks",
        "speed": "lillama.report.figures:speed",
        "stable_ranks": "lillama.report.figures:stable_ranks",
        "activations": "lillama.report.figures:activations",
    },
    Call(1),  # record
)
EVALUATORS: Registry[Callable[..., Any]] = Registry(
    "evaluator",
    {
        "harness": "lillama.evaluate.harness:harness",
        "perplexity": "lillama.evaluate.perplexity:perplexity",
        "speed": "lillama.evaluate.speed:speed",
        "stable_rank": "lillama.evaluate.stable_rank:stable_rank",
        "sample": "lillama.evaluate.sample:sample",
        "wer": "lillama.evaluate.speech:wer",
    },
    Call(2, options=True),  # model, context
)
PLUGINS = Plugins()


class Registries:
    """What the hook `register` receives: every registry a plugin may add to."""

    strategies = STRATEGIES
    initialisers = INITIALISERS
    objectives = OBJECTIVES
    losses = LOSSES
    schedules = SCHEDULES
    storages = STORAGES
    readers = READERS
    exports = EXPORTS
    figures = FIGURES
    evaluators = EVALUATORS


# A call upwards that no import shows: the host, which stands above this module, fills the registries. Announced here,
# so that a look-up finds what plugins add whoever makes it, and nobody has to remember to ask the host first.
discover_with("lillama.host:register_all")
