"""Evaluators: functions (model, context, *, options) -> metrics, named in the recipe's `evaluate:`.

The keyword-only parameters of an evaluator are its options, and their annotations the options' schema.
Importing this package or an evaluator's module imports neither torch nor transformers, so that a recipe is
checked quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lillama import registry


@dataclass
class Context:
    """What an evaluator knows besides the model.

    `tokenizer` may be a processor; `details` takes what a report wants besides numbers, such as sample
    texts; `where` is the evaluator's place in the recipe, for errors.
    """

    tokenizer: Any
    device: str
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    where: str = "evaluate"


def evaluate(
    model: Any,
    evaluators: Mapping[str, Mapping[str, Any]],
    context: Context,
    host_metrics: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Metrics of `model`, dense or factorised, by `evaluators` (a recipe's `evaluate:` section) in their order.

    The key NAME or NAME/LABEL yields metrics LABEL/METRIC (NAME/METRIC without a label, but
    METRIC as it is where it names a task already) and, if there are any, `context.details[key]`. `host_metrics` are
    those of plugins' `evaluate` hooks; an evaluator that is named wins over them. Names and options were checked
    when the recipe was loaded.
    """
    metrics = dict(host_metrics or {})
    for key, given in evaluators.items():
        name, _, label = key.partition("/")
        own = replace(context, details={}, where=f"evaluate.{key}")
        function = registry.EVALUATORS.get(name)
        options = registry.EVALUATORS.options(name).model_validate(given)
        chosen = {option: getattr(options, option) for option in type(options).model_fields}
        for metric, value in function(model, own, **chosen).items():
            whole = metric if "/" in metric and not label else f"{label or name}/{metric}"
            metrics[whole] = float(value)
        if own.details:
            context.details[key] = own.details
    return metrics
