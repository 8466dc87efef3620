"""The sequential schedule: layers outside, batches inside.

A layer is initialised from its real inputs, distilled, stored and freed, then both streams advance. Only one layer's
weights and optimiser state are ever on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lillama import memory
from lillama import student as students
from lillama.contract import Layer
from lillama.grams import Grams
from lillama.job import Job, captured_batches, place, through
from lillama.progress import Bar
from lillama.shelf import Shelf, Stream
from lillama.streams import Batch
from lillama.student import Student

Streams = dict[str, Stream]


def sequential(job: Job) -> None:
    """Layers outside, batches inside."""
    shelf = Shelf(job.directory.path / "streams", job.device.device, place(job))
    start, x = _resumed(job, shelf)
    batches, embedded = captured_batches(job, None if x else shelf.new("0000-teacher"))
    if embedded is not None:
        x = {"teacher": embedded, "student": embedded}
    steps = (job.total_steps or 1) * sum(1 for layer in job.layers if job.plan.planned(layer))
    with job.progress.phase("distil", steps) as bar, torch.no_grad():
        bar.unit = "tokens/s in this layer"
        bar.skip((job.total_steps or 1) * sum(1 for layer in job.layers[:start] if job.plan.planned(layer)))
        for position, layer in enumerate(job.layers[start:], start):
            bar.describe(layer.name)
            with job.teacher(layer) as teacher:
                job.source.prefetch(after.name for after in job.layers[position + 1 : position + 2])
                y = _work(job, shelf, position, teacher, batches, x, bar)
            if y:
                shelf.mark(position + 1, y)
            for stream in set(x.values()) - set(y.values()):
                stream.drop()
            x = y
            memory.give_back()
    shelf.clear()


def _resumed(job: Job, shelf: Shelf) -> tuple[int, Streams]:
    """The layer to go on with and the streams that enter it, where an earlier process left them in files."""
    found = shelf.marked() if shelf.place == "file" else None
    if found is not None:
        position, streams = found
        done = (layer for layer in job.layers[:position] if job.plan.planned(layer))
        whole = all(len(stream) == len(job.batches) for stream in streams.values())
        if whole and all(job.directory.has(job.file(layer)) for layer in done):
            job.directory.event("resumed", layer=job.layers[position].name)
            return position, streams
    shelf.clear()
    return 0, {}


def _work(
    job: Job, shelf: Shelf, position: int, teacher: nn.Module, batches: list[Batch], x: Streams, bar: Bar
) -> Streams:
    """Finish one layer of the sequential schedule; the streams that leave it (none after the last layer)."""
    layer = job.layers[position]
    planned, stored = job.plan.planned(layer), job.directory.has(job.file(layer))
    last = position == len(job.layers) - 1
    if stored and last:
        bar.skip(job.total_steps or 1)
        return {}
    y = {"teacher": through(job, shelf, position, teacher, batches, x["teacher"], "teacher")}
    student: nn.Module | None = teacher if x["student"] is not x["teacher"] else None
    if planned and stored:
        state = {name: value.to(job.device.device) for name, value in job.directory.tensors(job.file(layer)).items()}
        student = students.finished(layer, teacher, job.plan, state) if "student" in job.streams else None
        bar.skip(job.total_steps or 1)
    elif planned:
        trained = _distill_layer(job, layer, position, teacher, batches, x, y["teacher"], bar)
        if last:
            y["teacher"].drop()
            return {}
        student = trained if "student" in job.streams else None
    y["student"] = y["teacher"]
    if student is not None:
        y["student"] = through(job, shelf, position, student, batches, x["student"], "student")
    return y


def _distill_layer(
    job: Job,
    layer: Layer,
    position: int,
    teacher: nn.Module,
    batches: list[Batch],
    inputs: Streams,
    targets: Stream,
    bar: Bar,
) -> nn.Module:
    """Initialise, train and store one layer of the sequential schedule; returns it, finished."""
    grams = None
    if job.grams:
        listener = Grams(layer.name, teacher, job.plan.planned(layer), job.recipe.compress.gram_tokens, job.grams)
        with job.device.autocast():
            for name in sorted(job.streams):
                listener.add(batches, inputs[name], position)
        grams = listener.close()
    init = students.initial_factors(layer, teacher, job.plan, job.recipe, grams)
    student = Student(layer, position, teacher, job.plan, job.recipe, job.device, init, job.total_steps)
    del grams, init
    n = len(job.train)

    def example(i: int) -> tuple[Batch, Tensor, dict[str, Tensor]]:
        return batches[i], targets[i], {name: inputs[name][i] for name in student.wants}

    def check() -> float:
        return student.check(map(example, range(n, len(batches))))

    checks = job.check_steps()
    with torch.enable_grad():
        if n < len(batches):
            check()
        for step in range(1, job.total_steps + 1):
            batch, target, x = example((step - 1) % n)
            loss, _ = student.step(batch, target, x)
            bar.advance(tokens=batch.tokens, loss=loss)
            if step in checks and n < len(batches):
                job.directory.event("check", layer=layer.name, step=step, held_out_loss=check())
    if not job.total_steps:
        bar.advance()
    job.store(student)
    return student.module
