"""The concurrent schedule, as in the paper: batches outside, layers inside.

Every planned layer has its optimiser; one pass over the data per epoch; nothing above the last planned layer is
loaded or run.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from lillama.base import memory
from lillama.contract import Layer
from lillama.distill.job import Job, captured_batches, place, through
from lillama.distill.snapshot import Snapshot
from lillama.distill.student import Student
from lillama.distill.teachers import Teachers
from lillama.factorise import start
from lillama.factorise.grams import Grams
from lillama.pretrained.calls import Batch, Capture
from lillama.pretrained.streams import Shelf, Stream

Inputs = dict[str, Tensor]


def concurrent(job: Job) -> None:
    """Batches outside, layers inside (the paper's schedule)."""
    init = _initial_factors(job)

    with contextlib.ExitStack() as stack:
        capture = stack.enter_context(job.captured())
        teachers = Teachers(job, stack)
        planned = _students(job, teachers, init)
        snapshot = Snapshot(job.directory, planned, job.recipe.run.snapshot_seconds)
        start = snapshot.restore(job.device.device)
        checks = job.check_steps()
        if start == 0 and job.held:
            _check(job, teachers, planned, capture)
        if job.curve and start == 0:
            job.curve.after_step(job, 0, teachers.at, planned)
        with job.progress.phase("distil", job.total_steps) as bar:
            bar.skip(start)
            for step in range(start + 1, job.total_steps + 1):
                with torch.no_grad(), job.device.autocast():
                    batch = capture(job.train[(step - 1) % len(job.train)])
                loss = _pass(job, teachers, planned, batch, update=True)
                bar.advance(tokens=batch.tokens, loss=sum(loss.values()) / max(len(loss), 1))
                if step in checks and job.held:
                    _check(job, teachers, planned, capture)
                if job.curve:
                    job.curve.after_step(job, step, teachers.at, planned)
                snapshot.maybe(step)
        for student in planned.values():
            job.store(student)
        snapshot.remove()
        job.directory.forget(*init.values())


def _students(job: Job, teachers: Teachers, init: dict[str, str]) -> dict[int, Student]:
    """The students by position, with their starting factors."""
    found: dict[int, Student] = {}
    for position, layer in enumerate(job.layers):
        if job.plan.planned(layer):
            tensors = job.directory.tensors(init[layer.name]) if layer.name in init else {}
            start = {name: tensor.to(job.device.device) for name, tensor in tensors.items()}
            best = job.best_file(position)
            tied = {w.tied for w in job.plan.planned(layer)}
            owner = next((s for s in found.values() if s.layer.weights and s.layer.weights[0].name in tied), None)
            with teachers.at(position) as teacher:
                found[position] = Student(
                    layer, position, teacher, job.plan, job.recipe, job.device, start, job.total_steps, best, owner
                )
    return found


def _pass(job: Job, teachers: Teachers, planned: dict[int, Student], batch: Batch, *, update: bool) -> dict[int, float]:
    """One batch through all layers, bottom to top; the losses of the planned ones.

    With `update`, every planned layer takes a step on its own inputs. The student stream carries each layer's output
    from before its step, so that nothing runs twice.
    """
    losses = {}
    x: Inputs = {"teacher": batch.hidden, "student": batch.hidden}
    for position in range(len(job.layers)):
        student = planned.get(position)
        with teachers.at(position) as teacher, torch.no_grad(), job.device.autocast():
            target = batch.calls[position](teacher, x["teacher"])
            after = target
            if student is None and "student" in job.streams and x["student"] is not x["teacher"]:
                after = batch.calls[position](teacher, x["student"])
        if student is not None:
            if update:
                losses[position], outputs = student.step(batch, target, x)
            else:
                with torch.no_grad():
                    loss, outputs = student.distances(batch, target, x)
                    losses[position] = float(loss)
            after = outputs.get("student", target)
        x["student"] = after
        x["teacher"] = target
    return losses


def _check(job: Job, teachers: Teachers, planned: dict[int, Student], capture: Capture) -> None:
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
    learn = [layer for layer in job.layers if any(not w.tied for w in job.plan.planned(layer))]
    names = {layer.name: f"init/{job.file(layer).partition('/')[2]}" for layer in learn}
    # The factors of an embedding with a tied head depend on the inputs of both.
    due = {(job.tied_head(layer) if job.grams else None) or job.layers.index(layer): layer for layer in learn}
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
            start = due.get(position)
            wanted = start is not None and not job.directory.has(names[start.name])
            if wanted or stream is not None:
                with job.teacher(layer) as teacher, torch.no_grad():
                    job.source.prefetch(after.name for after in job.layers[position + 1 : position + 2])
                    if start is not None and wanted:
                        first = _start(job, start, position, teacher, batches, stream)
                        job.directory.put_tensors(names[start.name], first)
                    if stream is not None and position + 1 < len(job.layers):
                        before = stream
                        stream = through(job, shelf, position, teacher, batches, before, "teacher")
                        before.drop()
            memory.give_back()
            bar.advance()
    shelf.clear()
    return names


def _start(
    job: Job, layer: Layer, position: int, teacher: nn.Module, batches: list[Batch], stream: Stream | None
) -> dict[str, Tensor]:
    """The starting factors of `layer`, from the stream that enters the layer at `position` where they depend on it.

    That is another where the latter's factors are those of the former: a head tied to an embedding.
    """
    grams = None
    if stream is not None:
        here = job.layers[position]
        planned = job.plan.planned(here)
        listener = Grams(here.name, teacher, planned, job.recipe.compress.gram_tokens, job.grams)
        with job.device.autocast():
            grams = listener.add(batches, stream, position).close()
    grams = job.statistics(layer, grams)
    return start.initial_factors(layer, teacher, job.plan, job.recipe, grams)
