"""The engine: two schedules over one step (`Student.step`).

- sequential: layers outside, batches inside. A layer is initialised from its real inputs, distilled, stored and
  freed, then both streams advance. Only one layer's weights and optimiser state are ever on the device.
- concurrent: batches outside, layers inside, as in the paper. Every planned layer has its optimiser; one pass over
  the data per epoch; nothing above the last planned layer is loaded or run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lillama import student as students
from lillama.contract import Layer
from lillama.device import Device
from lillama.grams import Grams
from lillama.plan import Plan
from lillama.progress import Bar, Progress
from lillama.recipe import Recipe
from lillama.source import Source
from lillama.store import RunDirectory
from lillama.streams import Batch, Capture, advance
from lillama.student import Student

Batches = Sequence[dict[str, Tensor]]
Inputs = dict[str, Tensor]


@dataclass
class Job:
    """All that a schedule needs."""

    recipe: Recipe
    source: Source
    plan: Plan
    device: Device
    directory: RunDirectory
    progress: Progress
    batches: Batches

    def __post_init__(self) -> None:
        self.layers = self.plan.work
        held = round(len(self.batches) * self.recipe.distill.holdout)
        if self.recipe.distill.holdout and len(self.batches) > 1:
            held = max(held, 1)
        # The last batches are held out: batches are in shuffled order already.
        self.train, self.held = (
            self.batches[: len(self.batches) - held],
            self.batches[len(self.batches) - held :],
        )
        self.total_steps = len(self.train) * self.recipe.distill.epochs
        self.streams, self.wants_grams = students.needs(self.recipe)

    def check_steps(self) -> set[int]:
        """After which steps the held-out loss is measured: evenly spaced, the last step included."""
        checks = self.recipe.distill.checks
        return {round(self.total_steps * (i + 1) / checks) for i in range(checks)} - {0}

    def file(self, layer: Layer) -> str:
        """Where a finished layer is stored."""
        return f"layers/{self.plan.layers.index(layer):04d}-{layer.name}.safetensors"

    @contextlib.contextmanager
    def captured(self, park: bool = False) -> Iterator[Capture]:
        """The model's parts outside its layers, on the device, ready to capture calls (`park`: see there)."""
        outside = self.source.outside(layer.name for layer in self.plan.layers)
        self.source.materialise(outside, self.device.device)
        self.source.place_buffers(self.device.device)
        try:
            yield Capture(self.source.model, self.layers, self.device.device, park)
        finally:
            self.source.release_keys(outside)

    @contextlib.contextmanager
    def teacher(self, layer: Layer) -> Iterator[nn.Module]:
        """The layer as pretrained, read from disk for as long as the block lasts."""
        self.source.materialise([layer.name], self.device.device)
        module = self.source.model.get_submodule(layer.name)
        try:
            yield module
        finally:
            self.source.release(module)

    def store(self, student: Student) -> dict[str, Tensor]:
        """Store a finished layer and say how well it learned."""
        state = student.state()
        self.directory.put_tensors(self.file(student.layer), state)
        self.directory.event(
            "layer",
            layer=student.layer.name,
            steps=student.steps,
            initial_loss=student.first_loss,
            loss=student.best_loss,
        )
        return state


def distill(job: Job) -> None:
    """Distil every planned layer that is not stored yet, by the recipe's schedule."""
    if all(job.directory.has(job.file(layer)) for layer in job.layers if job.plan.planned(layer)):
        return
    {"sequential": sequential, "concurrent": concurrent}[job.recipe.distill.schedule](job)


def sequential(job: Job) -> None:
    """Layers outside, batches inside."""
    batches = _captured_batches(job)
    x_teacher = x_student = [batch.hidden for batch in batches]
    steps = (job.total_steps or 1) * sum(1 for layer in job.layers if job.plan.planned(layer))
    with job.progress.phase("distil", steps) as bar:
        bar.unit = "tokens/s in this layer"
        for position, layer in enumerate(job.layers):
            bar.describe(layer.name)
            with job.teacher(layer) as teacher, torch.no_grad():
                with job.device.autocast():
                    y_teacher = advance(teacher, position, batches, x_teacher)
                if not job.plan.planned(layer):
                    with job.device.autocast():
                        same = x_student is x_teacher
                        x_student = y_teacher if same else advance(teacher, position, batches, x_student)
                    x_teacher = y_teacher
                    continue
                stored = job.directory.has(job.file(layer))
                if stored:
                    state = {
                        name: value.to(job.device.device)
                        for name, value in job.directory.tensors(job.file(layer)).items()
                    }
                    bar.skip(job.total_steps or 1)
                else:
                    inputs = {"teacher": x_teacher, "student": x_student}
                    state = _distill_layer(job, layer, position, teacher, batches, inputs, y_teacher, bar)
                if "student" in job.streams:
                    student = students.finished(layer, teacher, job.plan, state)
                    with job.device.autocast():
                        x_student = advance(student, position, batches, x_student)
                else:
                    x_student = y_teacher
                x_teacher = y_teacher


def _captured_batches(job: Job) -> list[Batch]:
    with job.captured(park=True) as capture, job.progress.phase("embed", len(job.batches)) as bar:
        batches = []
        for batch in [*job.train, *job.held]:
            with job.device.autocast():
                batches.append(capture(batch))
            bar.advance()
        return batches


def _distill_layer(
    job: Job,
    layer: Layer,
    position: int,
    teacher: nn.Module,
    batches: list[Batch],
    inputs: dict[str, list[Tensor]],
    targets: list[Tensor],
    bar: Bar,
) -> dict[str, Tensor]:
    """Initialise, train and store one layer of the sequential schedule; returns its state."""
    grams = None
    if job.wants_grams:
        listener = Grams(layer.name, teacher, job.plan.planned(layer), job.recipe.compress.gram_tokens)
        with job.device.autocast():
            for name in sorted(job.streams):
                listener.add(batches, inputs[name], position)
        grams = listener.close()
    init = students.initial_factors(layer, teacher, job.plan, job.recipe, grams)
    student = Student(layer, position, teacher, job.plan, job.recipe, job.device, init, job.total_steps)
    n = len(job.train)
    example = [(batch, targets[i], {k: v[i] for k, v in inputs.items()}) for i, batch in enumerate(batches)]
    checks = job.check_steps()
    with torch.enable_grad():
        if n < len(batches):
            student.check(example[n:])
        for step in range(1, job.total_steps + 1):
            batch, target, x = example[(step - 1) % n]
            loss, _ = student.step(batch, target, x)
            bar.advance(tokens=batch.tokens, loss=loss)
            if step in checks and n < len(batches):
                held = student.check(example[n:])
                job.directory.event("check", layer=layer.name, step=step, held_out_loss=held)
    if not job.total_steps:
        bar.advance()
    return job.store(student)


def concurrent(job: Job) -> None:
    """Batches outside, layers inside (the paper's schedule)."""
    from lillama.snapshot import Snapshot

    init = _initial_factors(job)
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
                init[layer.name],
                job.total_steps,
            )
            for position, layer in enumerate(job.layers)
            if job.plan.planned(layer)
        }
        snapshot = Snapshot(job.directory, planned, job.recipe.run.snapshot_seconds)
        start = snapshot.restore(job.device.device)
        held = [capture(batch) for batch in job.held] if job.held else []
        checks = job.check_steps()
        if start == 0 and held:
            _check(job, teachers, planned, held)
        with job.progress.phase("distil", job.total_steps) as bar:
            bar.skip(start)
            for step in range(start + 1, job.total_steps + 1):
                with torch.no_grad(), job.device.autocast():
                    batch = capture(job.train[(step - 1) % len(job.train)])
                loss = _pass(job, teachers, planned, batch, update=True)
                bar.advance(tokens=batch.tokens, loss=sum(loss.values()) / max(len(loss), 1))
                if step in checks and held:
                    _check(job, teachers, planned, held)
                snapshot.maybe(step)
        for student in planned.values():
            job.store(student)
        snapshot.remove()


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


def _check(job: Job, teachers: Sequence[nn.Module], planned: dict[int, Student], held: Sequence[Batch]) -> None:
    """Measure the held-out loss of every planned layer and let each keep its best state."""
    totals = dict.fromkeys(planned, 0.0)
    for batch in held:
        for position, loss in _pass(job, teachers, planned, batch, update=False).items():
            totals[position] += loss * batch.tokens
    tokens = sum(batch.tokens for batch in held)
    for position, student in planned.items():
        loss = student.judge(totals[position] / max(tokens, 1))
        if student.steps:
            job.directory.event("check", layer=student.layer.name, step=student.steps, held_out_loss=loss)


def _initial_factors(job: Job) -> dict[str, dict[str, Tensor]]:
    """The starting factors of every planned layer, a layer at a time over the teacher stream; stored, so that a
    resumed run starts from the same ones without computing them again."""
    name = "init.safetensors"
    if not job.directory.has(name):
        batches = _captured_batches(job) if job.wants_grams else []
        stream = [batch.hidden for batch in batches]
        found: dict[str, Tensor] = {}
        with job.progress.phase("initialise", len(job.layers)) as bar:
            for position, layer in enumerate(job.layers):
                with job.teacher(layer) as teacher, torch.no_grad(), job.device.autocast():
                    planned = job.plan.planned(layer)
                    grams = None
                    if planned and job.wants_grams:
                        listener = Grams(layer.name, teacher, planned, job.recipe.compress.gram_tokens)
                        grams = listener.add(batches, stream, position).close()
                    with torch.autocast(job.device.device.type, enabled=False):
                        found |= students.initial_factors(layer, teacher, job.plan, job.recipe, grams)
                    stream = advance(teacher, position, batches, stream)
                bar.advance()
        job.directory.put_tensors(name, found)
    tensors = job.directory.tensors(name)
    return {
        layer.name: {key: t for key, t in tensors.items() if key.startswith(f"{layer.name}.")} for layer in job.layers
    }
