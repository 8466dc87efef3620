"""The original model run one layer at a time.

A walk has in memory what stands outside the layers while calls are captured, and one layer for as long as it is
needed. The activations that flow from layer to layer are streams, which have a place of their own (streams.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lillama.base.device import Device
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.pretrained.calls import Batch, Batches, Capture, arguments
from lillama.pretrained.source import Source
from lillama.pretrained.streams import Place, Stream, choose


@dataclass(frozen=True)
class Walk:
    """The model `source`, whose `layers` are run in order; `every` lists those beyond the last of them too."""

    source: Source
    layers: Sequence[Layer]
    every: Sequence[Layer]
    device: Device
    progress: Progress

    @contextlib.contextmanager
    def hold_outside(self, predicts: bool = False) -> Iterator[Any]:
        """The skeleton, with what stands outside its layers on the device for as long as the block lasts.

        An output head of its own is part of that only if the model is to predict.
        """
        model = self.source.model
        outside = self.source.outside((layer.name for layer in self.every), predicts)
        missing = [name for name in outside if model.get_parameter(name).is_meta]
        if missing:
            self.source.materialise(missing, self.device.device)
        self.source.place_buffers(self.device.device)
        try:
            yield model
        finally:
            self.source.release_keys(missing)

    @contextlib.contextmanager
    def capture(self, park: bool = False) -> Iterator[Capture]:
        """What captures the calls of the layers while the block lasts (`park`: see Capture)."""
        with self.hold_outside() as model:
            yield Capture(model, self.layers, self.device.device, park)

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[nn.Module]:
        """The layer as pretrained, read from disk for as long as the block lasts."""
        self.source.materialise([layer.name], self.device.device)
        module = self.source.model.get_submodule(layer.name)
        try:
            yield module
        finally:
            self.source.release(module)

    def prefetch_after(self, position: int) -> None:
        """Have the layer behind `position` read in the background."""
        self.source.prefetch(layer.name for layer in self.layers[position + 1 : position + 2])

    def capture_batches(self, raw: Batches, into: Stream | None, limit: int | None = None) -> list[Batch]:
        """Every batch as the layers see it, the first layer's input taken into a stream; stop after `limit` tokens."""
        batches: list[Batch] = []
        with self.capture(park=True) as capture, self.progress.phase("embed", len(raw)) as bar:
            for one in raw:
                if limit is not None and sum(batch.tokens for batch in batches) >= limit:
                    break
                with self.device.autocast():
                    batch, hidden = capture(one)
                batches.append(batch)
                if into is not None:
                    into.append(hidden)
                bar.advance()
        return batches

    @torch.no_grad()
    def run_through(
        self, module: nn.Module, position: int, batches: Sequence[Batch], stream: Stream, out: Stream
    ) -> Stream:
        """Fill `out` with what `module`, playing the layer at `position`, makes of a stream; returns `out`."""
        with self.device.autocast():
            for batch, hidden in zip(batches, stream):
                out.append(batch.calls[position](module, hidden))
        return out

    def choose_place(self, raw: Batches, copies: int, budgets: tuple[int, int]) -> Place:
        """Where `copies` streams of the batches have room; `budgets`: bytes on the device and on the host."""
        config = self.source.config.get_text_config()
        widest = max((weight.shape[1] for layer in self.every for weight in layer.weights), default=1)
        width = getattr(config, "hidden_size", widest)
        tokens = sum(max((t.numel() for t in arguments(one).values() if t.dim() == 2), default=0) for one in raw)
        return choose(copies * tokens * width * self.source.working.itemsize, *budgets)


class Targets(Protocol):
    """What a layer is to reproduce, by the number of the batch."""

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass
class LayerPass:
    """What travels together while one layer is worked on.

    `teacher` is the layer as pretrained, in memory for that long; `inputs` are the streams that enter it, by whose
    activations they are ("teacher", "student"); `targets` what it is to put out. Streams belong to the schedule that
    made the pass, and it drops them: whoever works on the layer reads them only.
    """

    layer: Layer
    position: int
    teacher: nn.Module
    batches: Sequence[Batch]
    inputs: Mapping[str, Stream]
    targets: Targets | None = None


class HeadTargets:
    """What a head is to reproduce, computed when it is asked for: logits are too wide to be kept for all batches."""

    def __init__(self, at: LayerPass, stream: Stream, device: Device) -> None:
        """`at` is the head's pass, `stream` the teacher's final hidden states."""
        self.at, self.stream, self.device = at, stream, device

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        with self.device.autocast():
            return self.at.batches[index].calls[self.at.position](self.at.teacher, self.stream[index])
