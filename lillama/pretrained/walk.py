"""The original model run one layer at a time.

A walk has in memory what stands outside the layers while calls are captured, and one layer for as long as it is
needed. The activations that flow from layer to layer are streams, which have a place of their own (streams.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lillama.base import ranks
from lillama.base.device import Device
from lillama.base.finite import finite
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.errors import DistillationError, LillamaError
from lillama.pretrained.calls import Batch, Batches, Call, Capture, arguments
from lillama.pretrained.rows import capture_rows, capture_whole
from lillama.pretrained.source import Source
from lillama.pretrained.streams import Place, Stream, choose


class Originals:
    """Watches what the original's layers put out, each batch once: from what is not finite nothing can be learned.

    Reading a number from a GPU makes the host wait for it: there what is found stays until `read`.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, int, int]] = set()
        self._waiting: list[tuple[str, int, Tensor]] = []

    def add(self, layer: str, batch: int, out: Tensor, start: int = 0) -> None:
        """Look at a layer's output of a batch, by its number. Raises as `read` does, at once on a CPU.

        `start` is the first position of a part of it.
        """
        if (layer, batch, start) in self._seen:
            return
        self._seen.add((layer, batch, start))
        self._waiting.append((layer, batch, finite(out)))
        if out.device.type == "cpu":
            self.read()

    def knows(self, layer: str) -> bool:
        """Whether the layer's output was looked at."""
        return any(name == layer for name, *_ in self._seen)

    def read(self) -> None:
        """Raise LillamaError for the first that was not finite, which names the layer and the batch."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for (layer, batch, _), good in zip(waiting, torch.stack([good for *_, good in waiting]).tolist()):
            if not good:
                raise LillamaError(
                    f"what the original puts out here is not finite in calibration batch {batch + 1}",
                    where=layer,
                    hint="Nothing can be learned from it. Try run.compute: float32, or look at the data and the model.",
                )


@dataclass(frozen=True)
class Walk:
    """The model `source`, whose `layers` are run in order; `every` lists those beyond the last of them too."""

    source: Source
    layers: Sequence[Layer]
    every: Sequence[Layer]
    device: Device
    progress: Progress
    originals: Originals = field(default_factory=Originals)

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
        forms = self.source.forms
        asked = [layer for layer in self.layers if layer.name in forms and forms[layer.name].computed]
        with self.hold_outside() as model, contextlib.ExitStack() as stack:
            for layer in asked:  # which must say what no token has an influence on
                stack.enter_context(self.open_layer(layer))
            yield Capture(model, self.layers, self.device.device, park, forms)

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

    def capture_batches(
        self, raw: Batches, into: Stream | None, limit: int | None = None, whole: bool = False
    ) -> list[Batch]:
        """Every batch as the layers see it, the first layer's input taken into a stream; stop after `limit` tokens.

        Several processes take some rows each of every batch, or with `whole` every so manieth batch.
        """
        batches: list[Batch] = []
        seen, step, own = 0, *((ranks.world(), ranks.rank()) if whole else (1, 0))
        with self.capture(park=True) as capture, self.progress.phase("embed", len(raw)) as bar:
            for start in range(0, len(raw), step):
                if limit is not None and seen >= limit:
                    break
                number, made = start + own, None
                if number < len(raw):
                    with self.device.autocast():
                        made = (capture_whole if whole else capture_rows)(capture, raw[number], number)
                tokens = made[0].tokens if made else 0
                each = ranks.gather(tokens) if whole else [tokens]
                if made and (limit is None or seen + sum(each[:own]) < limit):
                    batch, hidden = made
                    batch.before = seen + sum(each[:own])
                    batches.append(batch)
                    self.originals.add(f"the input of {self.layers[0].name}", number, hidden)
                    if into is not None:
                        into.append(hidden)
                seen += sum(each)
                bar.advance(min(step, len(raw) - start))
            self.originals.read()
        return batches

    @torch.no_grad()
    def run_through(
        self, module: nn.Module, position: int, batches: Sequence[Batch], stream: Stream, out: Stream
    ) -> Stream:
        """Fill `out` with what `module`, playing the layer at `position`, makes of a stream; returns `out`.

        Raises LillamaError where that is not finite.
        """
        name = self.layers[position].name
        good: list[Tensor] = []
        # An original layer runs a second time on what the compressed layers before it put out.
        original = module is self.source.model.get_submodule(name) and not self.originals.knows(name)
        with self.device.autocast():
            for batch, hidden in zip(batches, stream):
                made = batch.calls[position](module, hidden)
                if original:
                    self.originals.add(name, batch.number, made)
                else:
                    good.append(finite(made))
                out.append(made)
        self.originals.read()
        if good and not bool(torch.stack(good).all()):
            raise DistillationError(
                "what the compressed model puts out here is not finite",
                where=name,
                hint="Lower distill.learning_rate, or set distill.holdout so that the best state is kept.",
            )
        return out

    def choose_place(self, raw: Batches, copies: int, budgets: tuple[int, int], beside: int = 0) -> Place:
        """Where `copies` streams of the batches have room; `budgets`: bytes on the device and on the host.

        `beside`: bytes that are kept in the same place.
        """
        config = self.source.config.get_text_config()
        widest = max((weight.shape[1] for layer in self.every for weight in layer.weights), default=1)
        width = getattr(config, "hidden_size", widest)
        tokens = sum(max((t.numel() for t in arguments(one).values() if t.dim() == 2), default=0) for one in raw)
        # All processes do the same.
        return ranks.agree(choose(copies * tokens * width * self.source.working.itemsize + beside, *budgets))


@dataclass(frozen=True)
class HeadTarget:
    """What a head is to make of one batch, a few positions at a time: logits are too wide to be there for all.

    `call` is the head's, `head` the original, `hidden` [B, T, D] the teacher's final hidden states; `walk` is
    told what comes out, by the `name` of the layer and the `number` of the batch.
    """

    call: Call
    head: nn.Module
    hidden: Tensor
    walk: Walk
    name: str
    number: int

    @torch.no_grad()
    def of(self, part: range) -> Tensor:
        """The original's logits [B, N, V] of the positions `part`."""
        with self.walk.device.autocast():
            made = self.call(self.head, self.hidden[:, part.start : part.stop])
        self.walk.originals.add(self.name, self.number, made, part.start)
        return made


Target = Tensor | HeadTarget


class Targets(Protocol):
    """What a layer is to reproduce, by the number of the batch."""

    def __getitem__(self, index: int) -> Target: ...


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
    """What a head is to reproduce, by the number of the batch."""

    def __init__(self, at: LayerPass, stream: Stream, walk: Walk) -> None:
        """`at` is the head's pass, `stream` the teacher's final hidden states."""
        self.at, self.stream, self.walk = at, stream, walk

    def __getitem__(self, index: int) -> HeadTarget:
        at = self.at
        call = at.batches[index].calls[at.position]
        return HeadTarget(call, at.teacher, self.stream[index], self.walk, at.layer.name, index)
