"""Named choices of a recipe: what `strategy: bottom` or `objective: mse` stands for.

A registry maps a name to a function, or to "module:function" so that listing and checking names
imports nothing heavy. Plugins add to them in the hook `register`.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Strict, create_model, field_validator

from lillama.errors import LillamaError, did_you_mean

_SCALARS = {bool, int, float, str, types.NoneType}


class Options(BaseModel):
    """Frozen settings that refuse keys they do not know and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        # 1e6 is a float in YAML, and what people write for a million.
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Registry:
    """A named set of interchangeable functions. `kind` is the word used in errors."""

    def __init__(self, kind: str, builtin: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._targets: dict[str, str | Callable[..., Any]] = dict(builtin or {})

    def add(self, name: str, target: str | Callable[..., Any]) -> None:
        """Register `target` (a function, or "module:function") as `name`; another's name is an error."""
        if not (callable(target) or (isinstance(target, str) and ":" in target)):
            raise LillamaError(
                f"the {self.kind} '{name}' is neither a function nor 'module:function': {target!r}",
                hint="Pass the function itself.",
            )
        if self._targets.get(name, target) != target:
            raise LillamaError(f"the {self.kind} '{name}' is already registered", hint="Choose another name.")
        self._targets[name] = target

    def check(self, name: str, where: str | None = None) -> None:
        """Raise an error that names the nearest choice unless `name` is registered."""
        if name not in self._targets:
            raise LillamaError(
                f"no {self.kind} is called '{name}'", where=where, hint=did_you_mean(name, self._targets)
            )

    def get(self, name: str) -> Callable[..., Any]:
        """The function registered as `name`, imported on first use; LillamaError where that fails."""
        self.check(name)
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise LillamaError(
                f"the {self.kind} '{name}' cannot be loaded from {target}: {error}",
                hint="Install what it needs, or choose another.",
            ) from error
        return function

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
        return iter(sorted(self._targets))

    def __contains__(self, name: str) -> bool:
        return name in self._targets


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    union = get_origin(annotation) in (Union, types.UnionType)
    return set(get_args(annotation) if union else [annotation]) <= _SCALARS


STRATEGIES = Registry(
    "strategy",
    {
        "bottom": "lillama.plan.strategies:bottom",
        "top": "lillama.plan.strategies:top",
        "uniform": "lillama.plan.strategies:uniform",
        "fisher": "lillama.plan.fisher:fisher",
    },
)
INITIALISERS = Registry(
    "initialiser",
    {
        "svd": "lillama.factorise.initialisers:svd",
        "random": "lillama.factorise.initialisers:random",
        "whitened": "lillama.factorise.initialisers:whitened",
        "compensated": "lillama.factorise.initialisers:compensated",
        "fisher": "lillama.factorise.initialisers:fisher",
    },
)
OBJECTIVES = Registry(
    "objective",
    {
        "l1_logcos": "lillama.distill.losses:l1_logcos",
        "mse": "lillama.distill.losses:mse",
        "normalised_mse": "lillama.distill.losses:normalised_mse",
    },
)
LOSSES = Registry(
    "loss",
    {
        "teacher": "lillama.distill.losses:teacher",
        "student": "lillama.distill.losses:student",
        "teacher+student": "lillama.distill.losses:teacher_student",
    },
)
EVALUATORS = Registry(
    "evaluator",
    {
        "harness": "lillama.evaluate.harness:harness",
        "perplexity": "lillama.evaluate.perplexity:perplexity",
        "speed": "lillama.evaluate.speed:speed",
        "stable_rank": "lillama.evaluate.stable_rank:stable_rank",
        "sample": "lillama.evaluate.sample:sample",
        "wer": "lillama.evaluate.speech:wer",
    },
)
EXPORTS = Registry("export", {"dense": "lillama.checkpoint.export:export_dense"})
# Asked in turn what a data set's name stands for: those of plugins first, then in this order.
READERS = Registry(
    "data reader",
    {
        "package": "lillama.data.package:read_package",
        "files": "lillama.data.files:read_files",
        "hub": "lillama.data.hub:read_hub",
    },
)
FIGURES = Registry(
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
)


class Registries:
    """What the hook `register` receives: every registry a plugin may add to."""

    strategies = STRATEGIES
    initialisers = INITIALISERS
    objectives = OBJECTIVES
    losses = LOSSES
    evaluators = EVALUATORS
    exports = EXPORTS
    readers = READERS
    figures = FIGURES
