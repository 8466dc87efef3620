"""What a schedule works on: recipe, source, plan, data, and where finished layers go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lillama import student as students
from lillama.contract import Layer
from lillama.device import Device
from lillama.plan import Plan
from lillama.progress import Progress
from lillama.recipe import Recipe
from lillama.shelf import Place, Shelf, Stream, budgets, choose
from lillama.source import Source
from lillama.store import RunDirectory
from lillama.streams import Batch, Capture, arguments, outputs
from lillama.student import Student

Batches = Sequence[dict[str, Tensor]]


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


def place(job: Job) -> Place:
    """Where the streams have room: three are in use while a layer learns from the student's, else two."""
    width = job.source.config.get_text_config().hidden_size
    tokens = sum(
        max((t.numel() for t in arguments(batch).values() if t.dim() == 2), default=0) for batch in job.batches
    )
    size = torch.empty((), dtype=job.source.working).element_size()
    copies = 3 if "student" in job.streams else 2
    return choose(copies * tokens * width * size, *budgets(job.recipe.run, job.device.device))


def captured_batches(job: Job, stream: Stream | None, limit: int | None = None) -> tuple[list[Batch], Stream | None]:
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


def through(
    job: Job, shelf: Shelf, position: int, module: nn.Module, batches: list[Batch], stream: Stream, name: str
) -> Stream:
    """The stream behind layer `position`, played by `module`."""
    out = shelf.new(f"{position + 1:04d}-{name}")
    with job.device.autocast():
        for y in outputs(module, position, batches, stream):
            out.append(y)
    return out
