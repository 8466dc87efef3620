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

from lillama import memory
from lillama import student as students
from lillama.contract import Layer
from lillama.device import Device
from lillama.grams import Grams
from lillama.plan import Plan
from lillama.progress import Bar, Progress
from lillama.recipe import Recipe
from lillama.shelf import Place, Shelf, Stream, budgets, choose
from lillama.source import Source
from lillama.store import RunDirectory
from lillama.streams import Batch, Capture, arguments, outputs
from lillama.student import Student

Batches = Sequence[dict[str, Tensor]]
Inputs = dict[str, Tensor]
Streams = dict[str, Stream]


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
        self.streams, self.grams = students.needs(self.recipe)

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
    memory.return_large_blocks()
    {"sequential": sequential, "concurrent": concurrent}[job.recipe.distill.schedule](job)


def sequential(job: Job) -> None:
    """Layers outside, batches inside."""
    shelf = Shelf(job.directory.path / "streams", job.device.device, _place(job))
    start, x = _resumed(job, shelf)
    batches, embedded = _captured_batches(job, None if x else shelf.new("0000-teacher"))
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


def _place(job: Job) -> Place:
    """Where the streams have room: three are in use while a layer learns from the student's, else two."""
    width = job.source.config.get_text_config().hidden_size
    tokens = sum(
        max((t.numel() for t in arguments(batch).values() if t.dim() == 2), default=0) for batch in job.batches
    )
    size = torch.empty((), dtype=job.source.working).element_size()
    copies = 3 if "student" in job.streams else 2
    return choose(copies * tokens * width * size, *budgets(job.recipe.run, job.device.device))


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


def _captured_batches(job: Job, stream: Stream | None, limit: int | None = None) -> tuple[list[Batch], Stream | None]:
    """Every batch as the layers see it, its first hidden states taken into `stream`; stop after `limit` tokens."""
    with job.captured(park=True) as capture, job.progress.phase("embed", len(job.batches)) as bar:
        batches: list[Batch] = []
        for batch in [*job.train, *job.held]:
            if limit is not None and sum(b.tokens for b in batches) >= limit:
                break
            with job.device.autocast():
                batches.append(capture(batch))
            if stream is not None:
                stream.append(batches[-1].hidden)
            batches[-1].hidden = batches[-1].hidden.new_empty(0)
            bar.advance()
        return batches, stream


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
    y = {"teacher": _through(job, shelf, position, teacher, batches, x["teacher"], "teacher")}
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
        y["student"] = _through(job, shelf, position, student, batches, x["student"], "student")
    return y


def _through(
    job: Job, shelf: Shelf, position: int, module: nn.Module, batches: list[Batch], stream: Stream, name: str
) -> Stream:
    """The stream behind layer `position`, played by `module`."""
    out = shelf.new(f"{position + 1:04d}-{name}")
    with job.device.autocast():
        for y in outputs(module, position, batches, stream):
            out.append(y)
    return out


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

    def example(i: int) -> tuple[Batch, Tensor, Inputs]:
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


def concurrent(job: Job) -> None:
    """Batches outside, layers inside (the paper's schedule)."""
    from lillama.snapshot import Snapshot

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
    shelf = Shelf(job.directory.path / "streams", job.device.device, _place(job))
    shelf.clear()
    batches: list[Batch] = []
    stream: Stream | None = None
    if job.grams:
        batches, stream = _captured_batches(job, shelf.new("0000-teacher"), job.recipe.compress.gram_tokens)
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
                        stream = _through(job, shelf, position, teacher, batches, before, "teacher")
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
