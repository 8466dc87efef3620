"""The sequential schedule: layers outside, batches inside.

A layer is initialised from its real inputs, distilled, stored and freed, then both streams advance. Only one layer's
weights and optimiser state are ever on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lillama.base import memory
from lillama.base.progress import Bar
from lillama.contract import Layer
from lillama.distill import student as students
from lillama.distill.job import Job, Targets, captured_batches, place, through
from lillama.distill.student import Student
from lillama.distill.tied import distill_tied
from lillama.factorise import start
from lillama.factorise.grams import Grams
from lillama.factorise.refit import refitted
from lillama.pretrained.calls import Batch
from lillama.pretrained.streams import Shelf, Stream

Streams = dict[str, Stream]


def sequential(job: Job) -> None:
    """Layers outside, batches inside."""
    shelf = Shelf(job.directory.path / "streams", job.device.device, place(job))
    start, x = _resumed(job, shelf)
    # Where nothing learns, streams carry no more than an initialiser wants to see.
    limit = None if job.total_steps else job.recipe.compress.gram_tokens if job.grams else 0
    batches, embedded = captured_batches(job, None if x else shelf.new("0000-teacher"), limit)
    if embedded is not None:
        x = {"teacher": embedded, "student": embedded}
    steps = (job.total_steps or 1) * sum(1 for layer in job.layers if job.plan.planned(layer))
    left = [job.file(layer) for layer in job.layers if job.plan.planned(layer)]
    if job.curve and start == 0:
        job.curve.after_layer(job, 0)
    with job.progress.phase("distil", steps) as bar, torch.no_grad():
        bar.unit = "tokens/s in this layer"
        bar.skip((job.total_steps or 1) * sum(1 for layer in job.layers[:start] if job.plan.planned(layer)))
        for position, layer in enumerate(job.layers[start:], start):
            if all(job.directory.has(file) for file in left):
                remaining = sum(1 for after in job.layers[position:] if job.plan.planned(after))
                bar.skip((job.total_steps or 1) * remaining)
                if job.curve and position > start:
                    job.curve.after_layer(job, len(job.layers))
                break
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
            if job.curve:
                job.curve.after_layer(job, position + 1)
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
    if layer.kind == "head":
        targets = Targets(job, teacher, position, batches, x["teacher"])
        _distill_layer(job, layer, position, teacher, batches, x, targets, bar)
        return {}
    y = {"teacher": through(job, shelf, position, teacher, batches, x["teacher"], "teacher")}
    student: nn.Module | None = teacher if x["student"] is not x["teacher"] else None
    if planned and stored:
        student = students.finished(layer, teacher, job.plan, job.stored(layer)) if "student" in job.streams else None
        bar.skip(job.total_steps or 1)
    elif planned:
        head = job.tied_head(layer)
        if head is None:
            trained = _distill_layer(job, layer, position, teacher, batches, x, y["teacher"], bar)
        else:
            final = _ahead(job, shelf, position + 1, head, batches, y["teacher"])
            trained = distill_tied(job, layer, teacher, batches, (x["teacher"], y["teacher"], final), head, bar)
            final.drop()
        if last:
            y["teacher"].drop()
            return {}
        student = trained if "student" in job.streams else None
    y["student"] = y["teacher"]
    if student is not None:
        y["student"] = through(job, shelf, position, student, batches, x["student"], "student")
    return y


def _ahead(job: Job, shelf: Shelf, start: int, head: int, batches: list[Batch], stream: Stream) -> Stream:
    """The teacher's stream that enters the layer `head`, from the one that enters the layer `start`."""
    for position in range(start, head):
        with job.teacher(job.layers[position]) as teacher:
            after = through(job, shelf, position, teacher, batches, stream, "ahead")
        if position > start:
            stream.drop()
        stream = after
    return stream


def _distill_layer(
    job: Job,
    layer: Layer,
    position: int,
    teacher: nn.Module,
    batches: list[Batch],
    inputs: Streams,
    targets: Stream | Targets,
    bar: Bar,
) -> nn.Module:
    """Initialise, train and store one layer of the sequential schedule; returns it, finished."""
    init = _initial_factors(job, layer, position, teacher, batches, inputs)
    best = job.best_file(position)
    student = Student(layer, position, teacher, job.plan, job.recipe, job.device, init, job.total_steps, best)
    del init
    if job.recipe.run.low_memory:
        memory.give_back()
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


def _initial_factors(
    job: Job, layer: Layer, position: int, teacher: nn.Module, batches: list[Batch], inputs: Streams
) -> dict[str, Tensor]:
    """The starting factors of a layer, from the streams that enter it where they depend on them."""
    plan, recipe = job.plan, job.recipe
    if "cross" in job.grams:
        streams = (inputs["teacher"], inputs["student"])
        with job.device.autocast():
            return refitted(layer, position, teacher, plan, recipe, batches, streams)
    grams = None
    if job.grams:
        listener = Grams(layer.name, teacher, plan.planned(layer), recipe.compress.gram_tokens, job.grams)
        with job.device.autocast():
            for name in sorted(job.streams):
                listener.add(batches, inputs[name], position)
        grams = listener.close()
    grams = job.statistics(layer, grams)
    return start.initial_factors(layer, teacher, plan, recipe, grams)
