"""What a schedule works on: recipe, source, plan, data, and where finished layers go."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lillama.base.device import Device
from lillama.base.progress import Progress
from lillama.base.rundir import RunDirectory
from lillama.contract import Layer
from lillama.distill.student import Student
from lillama.factorise import embedding, start
from lillama.factorise.grams import Found
from lillama.factorise.statistics import fisher_file
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batch, Capture, arguments, outputs
from lillama.pretrained.source import Source
from lillama.pretrained.streams import Place, Shelf, Stream, budgets, choose
from lillama.recipe.schema import Recipe
from lillama.run.curve import Curve

Batches = Sequence[dict[str, Tensor]]
EMBEDDING = "embedding.json"  # the error of an embedding's vectors, by how often tokens occur


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
    curve: Curve | None = None

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
        self.streams, self.grams = start.needs(self.recipe)
        self.fisher = start.fisher_factors(self.recipe)

    def stored(self, layer: Layer) -> dict[str, Tensor]:
        """The state of a finished layer, on the device; that of a tied head with the embedding's factors."""
        tied = {weight.tied for weight in self.plan.planned(layer)}
        owners = [other for other in self.plan.layers if any(w.name in tied for w in other.weights)]
        tensors: dict[str, Tensor] = {}
        for one in (*owners, layer):
            tensors |= self.directory.tensors(self.file(one))
        return {name: value.to(self.device.device) for name, value in tensors.items()}

    @functools.cached_property
    def counts(self) -> Tensor:
        """How often each token occurs in the calibration data that is trained on."""
        vocabulary = next(w.shape[0] for layer in self.layers for w in layer.weights if w.kind == "embedding")
        return embedding.token_counts(self.train, vocabulary)

    def statistics(self, layer: Layer, grams: Found | None) -> Found | None:
        """`grams`, and what else an initialiser is to know.

        The factors of their Fisher information, where it names them; of an embedding in `layer` token counts and a tied
        head's Gram.
        """
        if self.fisher:
            grams = {name: {**(grams or {}).get(name, {}), **found} for name, found in self._fisher(layer).items()}
        if grams is None or layer.kind != "embedding":
            return grams
        found = dict(grams)
        for weight in self.plan.planned(layer):
            given = {
                **grams.get(weight.name, {}),
                "counts": embedding.floored(self.counts, self.recipe.compress.embedding_floor),
            }
            for _, use in self.plan.uses(weight):
                given |= {"head_gram": grams[use.name]["gram"]} if use.name in grams else {}
            found[weight.name] = given
        return found

    def _fisher(self, layer: Layer) -> Found:
        found: Found = {weight.name: {} for weight in self.plan.planned(layer)}
        for name, tensor in self.directory.tensors(fisher_file(layer)).items():
            weight, _, side = name.rpartition(".")
            if weight in found and f"{side}_fisher" in self.fisher:
                found[weight][f"{side}_fisher"] = tensor.to(self.device.device)
        return found

    def tied_head(self, layer: Layer) -> int | None:
        """The position of the head whose factors are those of the embedding `layer`."""
        uses = [use for weight in self.plan.planned(layer) for use in self.plan.uses(weight)]
        return uses[0][0] if uses else None

    def check_steps(self) -> set[int]:
        """After which steps the held-out loss is measured: evenly spaced, the last step included."""
        checks = self.recipe.distill.checks
        return {round(self.total_steps * (i + 1) / checks) for i in range(checks)} - {0}

    def file(self, layer: Layer) -> str:
        """Where a finished layer is stored."""
        return f"layers/{self.plan.layers.index(layer):04d}-{layer.name}.safetensors"

    def best_file(self, position: int) -> Path | None:
        """Where the best state of a layer is kept while it learns; None: in memory."""
        low = self.recipe.run.low_memory
        return self.directory.path / f"best.{position:04d}.safetensors" if low else None

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
            loss=student.best_loss if math.isfinite(student.best_loss) else None,  # none was measured
        )
        if student.embedding:
            report = student.embedding.report(self.counts)
            self.directory.put_json(EMBEDDING, report)
            self.directory.event("embedding", layer=student.layer.name, **report)
        return state


class Targets:
    """What a head is to reproduce, computed when it is asked for: logits are too wide to be kept for all batches."""

    def __init__(self, job: Job, head: nn.Module, position: int, batches: Sequence[Batch], inputs: Stream) -> None:
        self.job, self.head, self.position, self.batches, self.inputs = job, head, position, batches, inputs

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        with self.job.device.autocast():
            return self.batches[index].calls[self.position](self.head, self.inputs[index])


def place(job: Job, copies: int | None = None) -> Place:
    """Where `copies` streams have room; None: three are in use while a layer learns from the student's, else two."""
    width = job.source.config.get_text_config().hidden_size
    tokens = sum(
        max((t.numel() for t in arguments(batch).values() if t.dim() == 2), default=0) for batch in job.batches
    )
    size = torch.empty((), dtype=job.source.working).element_size()
    if copies is None:
        copies = 3 if "student" in job.streams else 2
    run = job.recipe.run
    room = budgets(run.stream_device_memory, run.stream_memory, job.device.device)
    return choose(copies * tokens * width * size, *room)


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
