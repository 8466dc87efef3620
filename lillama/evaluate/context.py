"""Evaluators: functions (model, context, *, options) -> metrics, named in the recipe's `evaluate:`.

The keyword-only parameters of an evaluator are its options, and their annotations the options' schema.
Importing this package or an evaluator's module imports neither torch nor transformers, so that a recipe is
checked quickly.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lillama import registry
from lillama.base import ranks
from lillama.errors import LillamaError


class Later:
    """A tokenizer that is read when it is first asked for: a model may have none, where nothing reads text."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = functools.cache(read)


@dataclass
class Context:
    """What an evaluator knows besides the model.

    `tokenizer` may be a processor, and may be given as `Later`: then it is read when an evaluator asks for it, which
    raises LillamaError where there is none. `details` takes what a report wants besides numbers, such as sample
    texts; `where` is the evaluator's place in the recipe, for errors.
    """

    tokenizer: Any
    device: str
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    where: str = "evaluate"

    def of(self, key: str) -> Context:
        """That of the evaluator `key` of a recipe, with details of its own."""
        own = copy.copy(self)
        own.details, own.where = {}, f"evaluate.{key}"
        return own


class _OnDemand:
    """The attribute `tokenizer` of a context."""

    def __get__(self, context: Context, owner: type) -> Any:
        given = context.__dict__["tokenizer"]
        if not isinstance(given, Later):
            return given
        try:
            return given.read()
        except LillamaError as error:
            error.where = context.where
            raise

    def __set__(self, context: Context, value: Any) -> None:
        context.__dict__["tokenizer"] = value


Context.tokenizer = _OnDemand()


Section = Mapping[str, Mapping[str, Any]]  # the options of evaluators, by name or NAME/LABEL
Evaluator = Callable[..., dict[str, float]]
F = TypeVar("F", bound=Evaluator)


def measured_in_turn(measure: Callable[..., list[dict[str, float]]]) -> Callable[[F], F]:
    """Marks an evaluator whose numbers depend on the moment: in a run, `measure` gives them for all models at once.

    It is called as (turns, contexts, **options), the models and a context for each, the original's first, and returns
    the metrics of each. What it puts into `details["ratio"]`, {metric: [median, smallest, largest]}, is shown as the
    change of that metric.
    """

    def mark(evaluator: F) -> F:
        evaluator.in_turn = measure  # type: ignore[attr-defined]
        return evaluator

    return mark


def shared_out(evaluator: F) -> F:
    """Marks an evaluator that shares its work out among the processes of a run; of others the first does it all."""
    evaluator.shared_out = True  # type: ignore[attr-defined]
    return evaluator


def chosen_evaluators(section: Section, in_turn: bool | None = None) -> Iterator[tuple[str, Evaluator, dict[str, Any]]]:
    """(key, evaluator, options) of a recipe's `evaluate:` section in order; of those marked `in_turn` or not, if given.

    Names and options were checked when the recipe was loaded.
    """
    for key, given in section.items():
        name = key.partition("/")[0]
        function = registry.EVALUATORS.get(name)
        if in_turn is None or hasattr(function, "in_turn") == in_turn:
            options = registry.EVALUATORS.options(name).model_validate(given)
            yield key, function, {option: getattr(options, option) for option in type(options).model_fields}


def whole_name(key: str, metric: str) -> str:
    """What a metric is called in all: LABEL/METRIC, or NAME/METRIC, or as it is where it names a task already."""
    name, _, label = key.partition("/")
    return metric if "/" in metric and not label else f"{label or name}/{metric}"


def evaluate(
    model: Any,
    section: Section,
    context: Context,
    host_metrics: Mapping[str, float] | None = None,
    in_turn: bool | None = None,
) -> dict[str, float]:
    """Metrics of `model`, dense or factorised, by the evaluators of a recipe's `evaluate:` section in their order.

    The key NAME or NAME/LABEL yields metrics LABEL/METRIC (NAME/METRIC without a label, but
    METRIC as it is where it names a task already) and, if there are any, `context.details[key]`. `host_metrics` are
    those of plugins' `evaluate` hooks; an evaluator that is named wins over them. Names and options were checked when
    the recipe was loaded. `in_turn`: see `chosen_evaluators`.
    """
    metrics = dict(host_metrics or {})
    for key, function, options in chosen_evaluators(section, in_turn):
        found, details = _run(function, model, context.of(key), options)
        metrics |= {whole_name(key, metric): float(value) for metric, value in found.items()}
        if details:
            context.details[key] = details
    return metrics


def _run(
    function: Evaluator, model: Any, context: Context, options: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, details) of one evaluator."""
    if hasattr(function, "shared_out"):
        return function(model, context, **options), context.details
    return ranks.by_first(lambda: (function(model, context, **options), context.details))
