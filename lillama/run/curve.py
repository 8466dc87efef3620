"""How the whole model's perplexity falls while its layers are distilled (the paper's Figures 3 and 5).

A few windows of text run through the skeleton with every layer that learned in the place of its original; a layer
that is not in memory is read for as long as it runs. A point costs one pass over these windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lillama.base import ranks
from lillama.distill.build import restore_layer
from lillama.distill.job import Job, OpenAt
from lillama.distill.student import Student
from lillama.errors import LillamaError
from lillama.evaluate import perplexity
from lillama.pretrained.calls import play_by, stand_in
from lillama.recipe.schema import Recipe

AT_ONCE = 8192  # tokens per forward pass


def text(recipe: Recipe, tokenizer: Callable[[], Any], batches: Any) -> perplexity.Windows | None:
    """The windows to measure on: of the recipe's first perplexity evaluator, else of the held-out batches.

    None where the recipe wants no curve. Raises LillamaError for a model that reads no text.
    """
    if not recipe.run.curve:
        return None
    if not batches or "input_ids" not in batches[-1]:
        raise LillamaError("only a causal model of text has a perplexity", where="run.curve", hint="Set it to 0.")
    most = recipe.run.curve_tokens
    given = next((o for name, o in recipe.evaluate.items() if name.partition("/")[0] == "perplexity"), None)
    if given is None:
        ids = torch.cat([batch["input_ids"] for batch in reversed(batches) if "attention_mask" not in batch][:most])
        return perplexity.Windows(ids[: max(most // ids.shape[1], 1)])
    names = ("dataset", "config", "split", "column", "sequence_length", "tokens", "special_tokens")
    options = {name: given[name] for name in names if name in given}
    options["tokens"] = min(options.get("tokens") or most, most)
    return perplexity.windows(tokenizer(), "evaluate.perplexity", **options)


class Curve:
    """Points of the curve, written as events: {"tokens", "layers", "perplexity"}, the first with that of "original".

    Whatever fails here is said and costs the run nothing but the curve.
    """

    def __init__(self, windows: perplexity.Windows, points: int) -> None:
        self.windows, self.points = windows, points
        self.known: dict[str, float] = {}
        self.failed = False

    def after_step(self, job: Job, step: int, open_at: OpenAt, students: Mapping[int, Student]) -> None:
        """A point of the concurrent schedule, where one is due after `step` (0: before the first)."""
        if step in {round(job.total_steps * i / self.points) for i in range(self.points + 1)}:
            trained = {position: student.module for position, student in students.items()}
            seen = [batch["input_ids"].numel() for batch in job.train]
            tokens = sum(seen) * (step // len(seen)) + sum(seen[: step % len(seen)])
            self._point(job, open_at, trained, tokens=tokens, layers=len(trained))

    def after_layer(self, job: Job, done: int) -> None:
        """A point of the sequential schedule, where one is due with the first `done` layers finished."""
        count = len(job.layers)
        if done in {round(count * i / self.points) for i in range(self.points + 1)}:
            finished = sum(1 for layer in job.layers[:done] if job.plan.changes(layer) and job.is_stored(layer))
            tokens = finished * job.recipe.distill.epochs * sum(batch["input_ids"].numel() for batch in job.train)
            self._point(
                job, lambda position: job.walk.open_layer(job.plan.layers[position]), {}, tokens=tokens, layers=done
            )

    def _point(self, job: Job, open_at: OpenAt, trained: Mapping[int, nn.Module], **where: int) -> None:
        if self.failed:
            return
        with job.progress.timed("curve"), ranks.alone():
            try:
                if not self.known:
                    self.known["original"] = self._measure(job, open_at, {}, original=True)
                found = self._measure(job, open_at, trained)
            except Exception as error:
                self.failed = True
                job.progress.say(f"no curve: {type(error).__name__}: {error}")
                return
        job.directory.event("curve", **where, perplexity=found, **self.known)

    @torch.no_grad()
    def _measure(self, job: Job, open_at: OpenAt, trained: Mapping[int, nn.Module], original: bool = False) -> float:
        total, count = 0.0, 0
        with job.walk.hold_outside(predicts=True) as model, _play_students(job, open_at, trained, original):
            for ids in self.windows.ids.split(max(AT_ONCE // self.windows.ids.shape[1], 1)):
                with job.device.autocast():
                    losses = perplexity.token_losses(model, ids.to(job.device.device), self.windows.given)
                total += float(losses.double().sum())
                count += losses.numel()
        return perplexity.exponential(total / count)


@contextlib.contextmanager
def _play_students(job: Job, open_at: OpenAt, trained: Mapping[int, nn.Module], original: bool) -> Iterator[None]:
    """Every layer's forward runs the module that stands for it now."""
    modules = [job.source.model.get_submodule(layer.name) for layer in job.plan.layers]
    before = [module.__dict__.get("forward") for module in modules]  # a plugin may have set one

    def play(position: int) -> Callable[..., Any]:
        layer = job.plan.layers[position]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if position in trained and not original:
                return trained[position](*args, **kwargs)
            beyond = position >= len(job.layers)
            context = job.walk.open_layer(layer) if beyond else open_at(position)
            # A copy of the layer that is made here (a student's) would carry this forward along, and call itself.
            with play_by(modules[position], before[position]), context as module:
                if not original and job.plan.changes(layer) and job.is_stored(layer):
                    module = restore_layer(layer, module, job.plan, job.read_stored(layer), job.left_of(layer))
                return module(*args, **kwargs)

        return forward

    with stand_in(modules, [play(position) for position in range(len(modules))]):
        yield


def of(recipe: Recipe, tokenizer: Callable[[], Any], batches: Any) -> Curve | None:
    """What measures the whole model while its layers learn, where the recipe wants that."""
    windows = text(recipe, tokenizer, batches)
    return None if windows is None else Curve(windows, recipe.run.curve)
