"""The concurrent schedule, as in the paper: batches outside, layers inside.

Every planned layer has its optimiser; one pass over the data per epoch; nothing above the last planned layer is
loaded or run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from lillama.base import memory, stop
from lillama.base.finite import unless_finite
from lillama.contract import Layer
from lillama.distill.job import Job, Watch
from lillama.distill.snapshot import Snapshot
from lillama.distill.student import Inputs, Student, mean_loss
from lillama.distill.teachers import Teachers
from lillama.factorise.grams import Grams
from lillama.factorise.start import from_tensors, initial_factors, to_tensors
from lillama.lowrank.storage import Factors
from lillama.pretrained.calls import Batch, Capture
from lillama.pretrained.rows import capture_rows
from lillama.pretrained.streams import Shelf, Stream
from lillama.pretrained.walk import HeadTarget, LayerPass, Target

Students = dict[int, Student]  # by position


def concurrent(job: Job, watch: Watch | None = None) -> None:
    """Batches outside, layers inside (the paper's schedule)."""
    init = _start_layers(job)
    with contextlib.ExitStack() as stack:
        capture = stack.enter_context(job.walk.capture())
        teachers = Teachers(job, stack)
        students = _build_students(job, teachers, init)
        snapshot = Snapshot(job.directory, students, job.recipe.run.snapshot_seconds)
        start = snapshot.restore()
        checks = job.check_steps()
        if start == 0 and (job.held or job.total_steps):
            _begin(job, teachers, students, capture)
        if watch and start == 0:
            watch.after_step(job, 0, teachers.at, students)
        with job.progress.phase("distil", job.total_steps) as bar, stop.at_a_good_moment():
            bar.skip(start)
            for step in range(start + 1, job.total_steps + 1):
                feed = _capture(job, capture, (step - 1) % len(job.train))
                losses = _pass(job, teachers, students, feed)
                bar.advance(tokens=feed.batch.tokens, loss=_mean(losses))
                if step in checks and job.held:
                    _check(job, teachers, students, capture)
                if watch:
                    watch.after_step(job, step, teachers.at, students)
                snapshot.maybe(step)
                stop.now()
        job.store(*students.values())
        snapshot.remove()
        _forget(job)


class _Feed(NamedTuple):
    """A batch as the layers see it, its number, and what enters the first of them."""

    number: int
    batch: Batch
    hidden: Tensor


@torch.no_grad()
def _capture(job: Job, capture: Capture, number: int) -> _Feed:
    """The batch of that number."""
    with job.device.autocast():
        batch, hidden = capture_rows(capture, job.batches[number], number)
    job.walk.originals.add(f"the input of {job.layers[0].name}", number, hidden)
    return _Feed(number, batch, hidden)


def _build_students(job: Job, teachers: Teachers, init: dict[str, str]) -> Students:
    """The students by position, with their starting factors."""
    found: Students = {}
    for position, layer in enumerate(job.layers):
        if job.plan.changes(layer):
            start: dict[str, Factors] = {}
            if layer.name in init:
                tensors = job.directory.tensors(init[layer.name])
                start = from_tensors({name: tensor.to(job.device.device) for name, tensor in tensors.items()})
            tied = {w.tied for w in job.plan.planned(layer)}
            owner = next((s for s in found.values() if s.layer.weights and s.layer.weights[0].name in tied), None)
            with teachers.at(position) as teacher:
                at = LayerPass(layer, position, teacher, (), {})
                found[position] = Student(at, job.training, start, job.best_file(position), owner)
    return found


def _pass(job: Job, teachers: Teachers, students: Students, feed: _Feed, update: bool = True) -> dict[int, Tensor]:
    """One batch through all layers, bottom to top; the losses of the planned ones, on the device.

    With `update`, every planned layer takes a step on its own inputs. The student stream carries each layer's output
    from before its step, so that nothing runs twice. Where that is not finite, the layers above get the original's, so
    that nobody pays for another's mistake.
    """
    losses: dict[int, Tensor] = {}
    batch = feed.batch
    x = {"teacher": feed.hidden, "student": feed.hidden}
    for position in range(len(job.layers)):
        student = students.get(position)
        if student is not None and job.layers[position].kind == "head":  # which is the last
            with teachers.at(position) as teacher:
                to = HeadTarget(batch.calls[position], teacher, x["teacher"], job.walk, student.layer.name, feed.number)
                losses[position] = _learn(student, feed, to, x, update)[0]
            break
        with teachers.at(position) as teacher, torch.no_grad(), job.device.autocast():
            target = batch.calls[position](teacher, x["teacher"])
            after = target
            if student is None and "student" in job.needs.streams and x["student"] is not x["teacher"]:
                after = batch.calls[position](teacher, x["student"])
        job.walk.originals.add(job.layers[position].name, feed.number, target)
        if student is not None:
            losses[position], outputs = _learn(student, feed, target, x, update)
            after = outputs.get("student", target)
        x = {"teacher": target, "student": after if after is target else unless_finite(after, target)}
    return losses


def _learn(student: Student, feed: _Feed, target: Target, x: Inputs, update: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the outputs of a student on a batch, before the step that it takes with `update`."""
    if update:
        return student.step(feed.batch, target, x)
    with torch.no_grad():
        return student.measure(feed.batch, target, x)


def _mean(losses: dict[int, Tensor]) -> Tensor:
    """The mean loss of a step, left on the device."""
    return torch.stack([*losses.values()]).mean() if losses else torch.zeros(())


def _measure(job: Job, teachers: Teachers, students: Students, capture: Capture) -> dict[int, float]:
    """The mean loss of every planned layer over the batches that layers are measured on."""
    found: dict[int, list[tuple[Tensor, int]]] = {position: [] for position in students}
    for number in job.first_batches:
        feed = _capture(job, capture, number)
        for position, measured in _pass(job, teachers, students, feed, update=False).items():
            found[position].append((measured, feed.batch.tokens))
    return {position: mean_loss(losses) for position, losses in found.items()}


def _begin(job: Job, teachers: Teachers, students: Students, capture: Capture) -> None:
    """Measure every planned layer before it learns; those whose loss is not finite stay dense."""
    losses = _measure(job, teachers, students, capture)
    for position, loss in losses.items():
        student = students[position]
        leader = student.owner or student
        if job.plan.changes(leader.layer) and job.keep_unless_finite(leader.layer, loss):
            leader.discard()
    for position in [p for p, student in students.items() if not job.plan.changes(student.layer)]:
        del students[position]
    if students and len(students) < len(losses):
        losses = _measure(job, teachers, students, capture)  # what is dense hands on something else
    if job.held:
        for position, student in students.items():
            student.note_held_out(losses[position])


def _check(job: Job, teachers: Teachers, students: Students, capture: Capture) -> None:
    """Measure the held-out loss of every planned layer and let each keep its best state."""
    losses = _measure(job, teachers, students, capture)
    for position, student in students.items():
        loss = student.note_held_out(losses[position])
        job.directory.event("check", layer=student.layer.name, step=student.steps, held_out_loss=loss)


def _start_layers(job: Job) -> dict[str, str]:
    """Store the starting factors of every planned layer, a layer at a time over the teacher stream; the files' names.

    A resumed run starts from the same ones without computing them again.
    """
    names = _names(job)
    learn = [layer for layer in job.layers if layer.name in names]
    if all(job.directory.has(name) for name in names.values()):
        return names
    # At which position a layer's factors can be had. Those of an embedding with a tied head depend on the inputs of
    # both: at the head's, which come last.
    due = {(job.tied_head(layer) if job.needs.grams else None) or job.layers.index(layer): layer for layer in learn}
    shelf = Shelf(job.directory.path / "streams", job.device.device, job.choose_place())
    shelf.clear_all()
    batches: list[Batch] = []
    stream: Stream | None = None
    if job.needs.grams:
        stream = shelf.new("0000-teacher")
        batches = job.walk.capture_batches(job.ordered, stream, job.recipe.compress.gram_tokens)
    with job.progress.phase("initialise", len(job.layers)) as bar, torch.no_grad():
        for position, layer in enumerate(job.layers):
            start = due.get(position)
            wanted = start is not None and not job.directory.has(names[start.name])
            if wanted or stream is not None:
                with job.walk.open_layer(layer) as teacher:
                    job.walk.prefetch_after(position)
                    inputs = {} if stream is None else {"teacher": stream}
                    at = LayerPass(layer, position, teacher, batches, inputs)
                    if start is not None and wanted:
                        found = _start_at(job, at, start)
                        job.keep_refused(start)
                        if found:
                            job.directory.put_tensors(names[start.name], to_tensors(found))
                    if stream is not None and position + 1 < len(job.layers):
                        out = shelf.new(f"{position + 1:04d}-teacher")
                        before, stream = stream, job.walk.run_through(teacher, position, batches, stream, out)
                        before.drop()
            memory.give_back()
            bar.advance()
    shelf.clear()
    return _names(job)  # less those of layers that are kept dense


def _names(job: Job) -> dict[str, str]:
    """Where the starting factors of every planned layer are kept, by its name."""
    learn = (layer for layer in job.layers if any(not w.tied for w in job.plan.planned(layer)))
    return {layer.name: _init_file(job, layer) for layer in learn}


def _init_file(job: Job, layer: Layer) -> str:
    return f"init/{job.file(layer).partition('/')[2]}"


def _forget(job: Job) -> None:
    """Drop the starting factors, those of layers that were kept dense afterwards too."""
    job.directory.forget(*(name for layer in job.plan.layers if job.directory.has(name := _init_file(job, layer))))


def _start_at(job: Job, at: LayerPass, layer: Layer) -> dict[str, Factors]:
    """The starting factors of `layer`, from the stream that enters the layer of `at` where they depend on it.

    The two differ where the one's factors are the other's: a head tied to an embedding, which is the same matrix.
    """
    grams = None
    if at.inputs:
        limit = job.recipe.compress.gram_tokens
        # Of a tied head it is the Gram of its inputs that the embedding's factors depend on, whatever else is named.
        wanted = job.needs.grams if layer is at.layer else {"gram"}
        # Which matrices are summed must not depend on what was kept dense in the meantime.
        listener = Grams(at.layer.name, at.teacher, job.plan.chosen(at.layer), limit, wanted)
        with job.device.autocast():
            grams = listener.add(at.batches, at.inputs["teacher"], at.position).close()
    known = job.statistics.complete(layer, grams)
    return initial_factors(dataclasses.replace(at, layer=layer), job.plan, job.initialise, known)
