"""The concurrent schedule, as in the paper: batches outside, layers inside.

Every planned layer has its optimiser; one pass over the data per epoch; nothing above the last planned layer is
loaded or run.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

from lillama.base import memory
from lillama.contract import Layer
from lillama.distill.job import Job, Watch
from lillama.distill.snapshot import Snapshot
from lillama.distill.student import Student
from lillama.distill.teachers import Teachers
from lillama.factorise.grams import Grams
from lillama.factorise.start import from_tensors, initial_factors, to_tensors
from lillama.lowrank.storage import Factors
from lillama.pretrained.calls import Batch, Capture, RawBatch
from lillama.pretrained.streams import Shelf, Stream
from lillama.pretrained.walk import LayerPass

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
        if start == 0 and job.held:
            _check(job, teachers, students, capture)
        if watch and start == 0:
            watch.after_step(job, 0, teachers.at, students)
        with job.progress.phase("distil", job.total_steps) as bar:
            bar.skip(start)
            for step in range(start + 1, job.total_steps + 1):
                batch, hidden = _capture(job, capture, job.train[(step - 1) % len(job.train)])
                losses = _pass(job, teachers, students, batch, hidden)
                bar.advance(tokens=batch.tokens, loss=_mean(losses))
                if step in checks and job.held:
                    _check(job, teachers, students, capture)
                if watch:
                    watch.after_step(job, step, teachers.at, students)
                snapshot.maybe(step)
        job.store(*students.values())
        snapshot.remove()
        job.directory.forget(*init.values())


@torch.no_grad()
def _capture(job: Job, capture: Capture, raw: RawBatch) -> tuple[Batch, Tensor]:
    """A batch as the layers see it, and what enters the first of them."""
    with job.device.autocast():
        return capture(raw)


def _build_students(job: Job, teachers: Teachers, init: dict[str, str]) -> Students:
    """The students by position, with their starting factors."""
    found: Students = {}
    for position, layer in enumerate(job.layers):
        if job.plan.planned(layer):
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


def _pass(
    job: Job, teachers: Teachers, students: Students, batch: Batch, hidden: Tensor, update: bool = True
) -> dict[int, Tensor]:
    """One batch through all layers, bottom to top; the losses of the planned ones, on the device.

    With `update`, every planned layer takes a step on its own inputs. The student stream carries each layer's output
    from before its step, so that nothing runs twice.
    """
    losses: dict[int, Tensor] = {}
    x = {"teacher": hidden, "student": hidden}
    for position in range(len(job.layers)):
        student = students.get(position)
        with teachers.at(position) as teacher, torch.no_grad(), job.device.autocast():
            target = batch.calls[position](teacher, x["teacher"])
            after = target
            if student is None and "student" in job.needs.streams and x["student"] is not x["teacher"]:
                after = batch.calls[position](teacher, x["student"])
        if student is not None:
            if update:
                losses[position], outputs = student.step(batch, target, x)
            else:
                with torch.no_grad():
                    losses[position], outputs = student.measure(batch, target, x)
            after = outputs.get("student", target)
        x = {"teacher": target, "student": after}
    return losses


def _mean(losses: dict[int, Tensor]) -> Tensor:
    """The mean loss of a step, left on the device."""
    return torch.stack([*losses.values()]).mean() if losses else torch.zeros(())


def _check(job: Job, teachers: Teachers, students: Students, capture: Capture) -> None:
    """Measure the held-out loss of every planned layer and let each keep its best state."""
    totals, tokens = dict.fromkeys(students, 0.0), 0
    for raw in job.held:
        batch, hidden = _capture(job, capture, raw)
        tokens += batch.tokens
        for position, measured in _pass(job, teachers, students, batch, hidden, update=False).items():
            totals[position] += float(measured) * batch.tokens
    for position, student in students.items():
        loss = student.note_held_out(totals[position] / max(tokens, 1))
        if student.steps:
            job.directory.event("check", layer=student.layer.name, step=student.steps, held_out_loss=loss)


def _start_layers(job: Job) -> dict[str, str]:
    """Store the starting factors of every planned layer, a layer at a time over the teacher stream; the files' names.

    A resumed run starts from the same ones without computing them again.
    """
    learn = [layer for layer in job.layers if any(not w.tied for w in job.plan.planned(layer))]
    names = {layer.name: f"init/{job.file(layer).partition('/')[2]}" for layer in learn}
    if all(job.directory.has(name) for name in names.values()):
        return names
    # At which position a layer's factors can be had. Those of an embedding with a tied head depend on the inputs of
    # both: at the head's, which come last.
    due = {(job.tied_head(layer) if job.needs.grams else None) or job.layers.index(layer): layer for layer in learn}
    shelf = Shelf(job.directory.path / "streams", job.device.device, job.choose_place())
    shelf.clear()
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
                        job.directory.put_tensors(names[start.name], to_tensors(found))
                    if stream is not None and position + 1 < len(job.layers):
                        out = shelf.new(f"{position + 1:04d}-teacher")
                        before, stream = stream, job.walk.run_through(teacher, position, batches, stream, out)
                        before.drop()
            memory.give_back()
            bar.advance()
    shelf.clear()
    return names


def _start_at(job: Job, at: LayerPass, layer: Layer) -> dict[str, Factors]:
    """The starting factors of `layer`, from the stream that enters the layer of `at` where they depend on it.

    The two differ where the one's factors are the other's: a head tied to an embedding, which is the same matrix.
    """
    grams = None
    if at.inputs:
        limit = job.recipe.compress.gram_tokens
        # Of a tied head it is the Gram of its inputs that the embedding's factors depend on, whatever else is named.
        wanted = job.needs.grams if layer is at.layer else {"gram"}
        listener = Grams(at.layer.name, at.teacher, job.plan.planned(at.layer), limit, wanted)
        with job.device.autocast():
            grams = listener.add(at.batches, at.inputs["teacher"], at.position).close()
    known = job.statistics.complete(layer, grams)
    return initial_factors(dataclasses.replace(at, layer=layer), job.plan, job.initialise, known)
