"""The concurrent schedule, as in the paper: batches outside, layers inside.

Every planned layer has its optimiser; one pass over the data per epoch; nothing above the last planned layer is
loaded or run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lillama import memory
from lillama import student as students
from lillama.contract import Layer
from lillama.grams import Grams
from lillama.job import Job, captured_batches, place, through
from lillama.shelf import Shelf, Stream
from lillama.snapshot import Snapshot
from lillama.streams import Batch, Capture
from lillama.student import Student

Inputs = dict[str, Tensor]


def concurrent(job: Job) -> None:
    """Batches outside, layers inside (the paper's schedule)."""
    init = _initial_factors(job)

    def start_of(layer: Layer) -> dict[str, Tensor]:
        tensors = job.directory.tensors(init[layer.name])
        return {name: tensor.to(job.device.device) for name, tensor in tensors.items()}

    with contextlib.ExitStack() as stack:
        capture = stack.enter_context(job.captured())
        teachers = [stack.enter_context(job.teacher(layer)) for layer in job.layers]
        planned = {
            position: Student(
                layer,
                position,
                teachers[position],
                job.plan,
                job.recipe,
                job.device,
                start_of(layer),
                job.total_steps,
            )
            for position, layer in enumerate(job.layers)
            if job.plan.planned(layer)
        }
        snapshot = Snapshot(job.directory, planned, job.recipe.run.snapshot_seconds)
        start = snapshot.restore(job.device.device)
        checks = job.check_steps()
        if start == 0 and job.held:
            _check(job, teachers, planned, capture)
        with job.progress.phase("distil", job.total_steps) as bar:
            bar.skip(start)
            for step in range(start + 1, job.total_steps + 1):
                with torch.no_grad(), job.device.autocast():
                    batch = capture(job.train[(step - 1) % len(job.train)])
                loss = _pass(job, teachers, planned, batch, update=True)
                bar.advance(tokens=batch.tokens, loss=sum(loss.values()) / max(len(loss), 1))
                if step in checks and job.held:
                    _check(job, teachers, planned, capture)
                snapshot.maybe(step)
        for student in planned.values():
            job.store(student)
        snapshot.remove()
        job.directory.forget(*init.values())


def _pass(
    job: Job, teachers: Sequence[nn.Module], planned: dict[int, Student], batch: Batch, *, update: bool
) -> dict[int, float]:
    """One batch through all layers, bottom to top; the losses of the planned ones.

    With `update`, every planned layer takes a step on its own inputs. The student stream carries each layer's output
    from before its step, so that nothing runs twice.
    """
    losses = {}
    x: Inputs = {"teacher": batch.hidden, "student": batch.hidden}
    for position, teacher in enumerate(teachers):
        with torch.no_grad(), job.device.autocast():
            target = batch.calls[position](teacher, x["teacher"])
        student = planned.get(position)
        if student is None:
            if "student" in job.streams and x["student"] is not x["teacher"]:
                with torch.no_grad(), job.device.autocast():
                    x["student"] = batch.calls[position](teacher, x["student"])
            else:
                x["student"] = target
        else:
            if update:
                losses[position], outputs = student.step(batch, target, x)
            else:
                with torch.no_grad():
                    loss, outputs = student.distances(batch, target, x)
                    losses[position] = float(loss)
            x["student"] = outputs.get("student", target)
        x["teacher"] = target
    return losses


def _check(job: Job, teachers: Sequence[nn.Module], planned: dict[int, Student], capture: Capture) -> None:
    """Measure the held-out loss of every planned layer and let each keep its best state."""
    totals, tokens = dict.fromkeys(planned, 0.0), 0
    for raw in job.held:
        with torch.no_grad(), job.device.autocast():
            batch = capture(raw)
        tokens += batch.tokens
        for position, loss in _pass(job, teachers, planned, batch, update=False).items():
            totals[position] += loss * batch.tokens
    for position, student in planned.items():
        loss = student.judge(totals[position] / max(tokens, 1))
        if student.steps:
            job.directory.event("check", layer=student.layer.name, step=student.steps, held_out_loss=loss)


def _initial_factors(job: Job) -> dict[str, str]:
    """Store the starting factors of every planned layer, a layer at a time over the teacher stream; the files' names.

    A resumed run starts from the same ones without computing them again.
    """
    names = {layer.name: f"init/{job.file(layer).partition('/')[2]}" for layer in job.layers if job.plan.planned(layer)}
    if all(job.directory.has(name) for name in names.values()):
        return names
    shelf = Shelf(job.directory.path / "streams", job.device.device, place(job))
    shelf.clear()
    batches: list[Batch] = []
    stream: Stream | None = None
    if job.grams:
        batches, stream = captured_batches(job, shelf.new("0000-teacher"), job.recipe.compress.gram_tokens)
    with job.progress.phase("initialise", len(job.layers)) as bar:
        for position, layer in enumerate(job.layers):
            wanted = layer.name in names and not job.directory.has(names[layer.name])
            if wanted or stream is not None:
                with job.teacher(layer) as teacher, torch.no_grad():
                    job.source.prefetch(after.name for after in job.layers[position + 1 : position + 2])
                    if wanted:
                        job.directory.put_tensors(names[layer.name], _start(job, position, teacher, batches, stream))
                    if stream is not None:
                        before = stream
                        stream = through(job, shelf, position, teacher, batches, before, "teacher")
                        before.drop()
            memory.give_back()
            bar.advance()
    shelf.clear()
    return names


def _start(
    job: Job, position: int, teacher: nn.Module, batches: list[Batch], stream: Stream | None
) -> dict[str, Tensor]:
    """The starting factors of one layer, from the stream that enters it where they depend on it."""
    layer, grams = job.layers[position], None
    if stream is not None:
        planned = job.plan.planned(layer)
        listener = Grams(layer.name, teacher, planned, job.recipe.compress.gram_tokens, job.grams)
        with job.device.autocast():
            grams = listener.add(batches, stream, position).close()
    return students.initial_factors(layer, teacher, job.plan, job.recipe, grams)
