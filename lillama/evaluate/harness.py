"""Accuracy on public benchmarks: EleutherAI's lm-eval on the model in memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.tasks import GROUPS, PAPER, Library, described, main_metric, paths_only, version


def harness(
    model: Any,
    context: Context,
    *,
    tasks: Annotated[
        list[str], Field(min_length=1, description="lm-eval's tasks, groups, tags or globs of tasks; paper: its nine.")
    ] = ["paper"],  # noqa: B006  # never changed
    files: Annotated[
        str | dict[str, Any] | None,
        Field(
            description="Local data: a folder of files named TASK.jsonl or TASK.SPLIT.jsonl, or a mapping from a task "
            "(or glob) to a file, or to {SPLIT: file}; .json, .csv, .tsv, .parquet, .txt too. null: the hub's."
        ),
    ] = None,
    limit: Annotated[
        float | None, Field(gt=0, description="Examples of each task at most; below 1 a share; null: all.")
    ] = None,
    fewshot: Annotated[int | None, Field(ge=0, description="Examples in the prompt; null: as the task has it.")] = 0,
    batch_size: Annotated[int | None, Field(ge=1, description="Null: 8, on a GPU what fits.")] = None,
    chat: Annotated[bool, Field(description="Put prompts through the chat template.")] = False,
    include: Annotated[str | None, Field(description="A folder with tasks of your own (lm-eval's YAML).")] = None,
) -> dict[str, float]:
    """{"TASK/METRIC", "TASK/METRIC_stderr", ..., "average", "average_stderr"}: what lm-eval says, as fractions.

    The average, given for several tasks, is over each task's main metric: the paper's for its nine, else acc_norm
    before acc before the first; its name is `paper/average` for the paper's nine. `context.details` takes versions,
    limit, batch size, dtype and for every task the data, the number of examples and, where the main metric is 0 or
    1, each example's (`hits`, for paired comparisons). Raises LillamaError for unknown tasks and data that cannot be
    read.
    """
    _require(context.where)
    with tempfile.TemporaryDirectory(prefix="lillama-tasks-") as place, _quiet():
        library = Library(Path(place), include, files, context.where)
        chosen = library.load(tasks)
        size: int | str = batch_size or (8 if context.device == "cpu" else "auto")
        with _wrapped(model, context.tokenizer, size) as lm:
            results = _run(lm, chosen, limit, fewshot, chat, context.where)
            used = max(getattr(lm, "batch_sizes", {}).values(), default=size)
    names = list(dict.fromkeys(name for pattern in tasks for name in GROUPS.get(pattern, (pattern,))))
    details = _details(results, library, limit, fewshot, used, model)
    context.details.update(details)
    return _metrics(results, details["tasks"], "paper/" if set(names) == set(PAPER) else "")


def _require(where: str) -> None:
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise LillamaError(
            f"lm-eval is not installed, or lacks something ({error})",
            where=where,
            hint="Install it: pip install 'lillama[harness]'.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's advice out of our output, and its bars where nobody watches."""
    loggers = {logging.getLogger(name): logging.ERROR for name in ("lm_eval", "datasets", "transformers")}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        if sys.stderr.isatty():
            yield
        else:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _wrapped(model: Any, tokenizer: Any, batch_size: int | str) -> Iterator[Any]:
    """The model as lm-eval's, in eval mode."""
    from lm_eval.models.huggingface import HFLM

    training = model.training
    # lm-eval ties weights anew, which would undo a head that was given weights of its own; they are tied already.
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        del model.tie_weights
        model.train(training)


def _run(lm: Any, tasks: list[Any], limit: float | None, fewshot: int | None, chat: bool, where: str) -> Any:
    import lm_eval

    try:
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=fewshot,
            limit=None if limit is None else int(limit) if limit >= 1 else limit,
            apply_chat_template=chat,
            task_manager=paths_only(),
        )
    except (KeyError, ValueError, TypeError) as error:  # a row that the task's own code cannot read
        raise LillamaError(
            f"lm-eval stopped: {type(error).__name__}: {error}",
            where=where,
            hint="Where a task has local files: do their rows have the columns of the hub's version?",
        ) from error


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `metric,filter` keys as metrics; the filter is named where there is one. Others are left out."""
    found = {}
    for key, value in result.items():
        name, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            found[name if chosen == "none" else f"{name}_{chosen}"] = float(value)
    return found


def _details(
    results: Any, library: Library, limit: float | None, fewshot: int | None, batch_size: Any, model: Any
) -> dict[str, Any]:
    """What a reader needs to know to get the same numbers."""
    found: dict[str, Any] = {}
    for name, result in results["results"].items():
        values = _values(result)
        names = [key for key in values if not key.endswith("_stderr")]
        if not names:
            continue
        chosen = main_metric(name, names)
        samples = results.get("samples", {}).get(name, [])
        hits = [sample.get(chosen) for sample in samples]
        found[name] = {
            "version": results.get("versions", {}).get(name),
            "metric": chosen,
            "examples": results.get("n-samples", {}).get(name, {}).get("effective"),
            "fewshot": results.get("n-shot", {}).get(name),
            "data": described(library.data.get(name)) or "hub",
        }
        if hits and set(hits) <= {0, 1}:
            found[name]["hits"] = "".join(str(int(hit)) for hit in hits)
            asked = " ".join(str(sample.get("doc_hash")) for sample in samples)
            found[name]["questions"] = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return {
        "lm_eval": version(),
        "limit": limit,
        "fewshot": fewshot,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": found,
    }


def _metrics(results: Any, tasks: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Every task's metrics and, for several tasks, their average.

    Its error takes them as independent, unless they ask the same questions (prompts of one benchmark): then it is that
    of the mean over questions, each question's value being its mean over the prompts.
    """
    metrics: dict[str, float] = {}
    for name in tasks:
        metrics |= {f"{name}/{key}": value for key, value in _values(results["results"][name]).items()}
    groups = set(results.get("groups", {}))
    means = [f"{name}/{task['metric']}" for name, task in tasks.items() if name not in groups]
    if len(means) > 1:
        metrics[f"{prefix}average"] = sum(metrics[name] for name in means) / len(means)
        errors = [metrics.get(f"{name}_stderr") for name in means]
        known = [error for error in errors if error is not None]
        paired = _paired_error([task for name, task in tasks.items() if name not in groups])
        if paired is not None:
            metrics[f"{prefix}average_stderr"] = paired
        elif len(known) == len(means):
            metrics[f"{prefix}average_stderr"] = sum(error**2 for error in known) ** 0.5 / len(means)
    return metrics


def _paired_error(tasks: Sequence[Mapping[str, Any]]) -> float | None:
    """The standard error of the mean over tasks that ask the same questions; None where they do not."""
    hits = [task.get("hits", "") for task in tasks]
    if len({task.get("questions") for task in tasks}) > 1 or min(map(len, hits), default=0) < 2:
        return None
    means = [sum(map(int, answers)) / len(hits) for answers in zip(*hits, strict=True)]
    return statistics.stdev(means) / len(means) ** 0.5
