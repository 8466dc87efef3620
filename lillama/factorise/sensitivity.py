"""How much the model's predictions depend on every weight's errors, measured once before ranks are chosen.

For a weight y = W x and g, the gradient at a position of y of -log p(t) where t is drawn from the model's own
predictions, an error E of W costs about 1/2 sum (g^T E x)^2 of KL divergence: the Fisher information. It is kept as
two factors (K-FAC, arXiv 1503.05671), G = sum g g^T / (tokens predicted) and H = sum c x x^T / sum c, with which the
cost is about 1/2 tr(G E H E^T) nats per token. c = |g|^2 / (|g|^2 + its mean) leaves out positions that nobody attends
to (the silence after a clip); |g|^2 itself would rest on a few (docs/results/quality.md). Inputs of further tokens may
join H (inputs.py). So errors count by what they do to the predictions, and those of different weights compare. Both are
kept on the weight's smaller side, as initialisers.fisher wants them: G and W H W^T, or W^T G W and H.

The original runs forwards layer by layer, its streams are kept, and gradients run back through them, also layer by
layer: no more than one layer is in memory besides what stands outside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lillama.base import memory, ranks
from lillama.base.device import send
from lillama.base.rundir import FISHER, RunDirectory
from lillama.contract import Layer
from lillama.factorise.inputs import MoreInputs, kept_bytes, split
from lillama.factorise.kfac import Listener
from lillama.factorise.neurons import Known, Widths, neurons_file, read_narrowings
from lillama.factorise.statistics import fisher_file, read_fisher, write_fisher
from lillama.plan.budget import Measured
from lillama.plan.plan import observable, rank_multiple
from lillama.pretrained.calls import Batch, Batches, arguments, run_model, stand_in
from lillama.pretrained.order import drawn_order
from lillama.pretrained.players import end_with, main_output, predicts_classes
from lillama.pretrained.predictions import KEEP, Predicted, backward_in_chunks, positions_at_once
from lillama.pretrained.streams import Shelf, Stream, budgets
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Recipe


def measure_spectra(walk: Walk, directory: RunDirectory, raw: Batches, recipe: Recipe) -> Measured:
    """The spectrum of every observed weight (see `fisher_spectrum`), measured unless that was done before.

    With what few bits would cost it, where ranks and bits share one budget, and how narrow MLPs may be, where neurons
    may go.

    `walk` lists the layers of the whole model. The factors that belong to the spectra are left in the run directory,
    where `Statistics` finds them, until `forget`.
    """
    layers, in_mlps = _observed(walk, recipe)
    if not all(directory.has(file) for file in measured_files(walk, recipe)):
        _Measurement.of(walk, directory, raw, recipe).run()
    found = {name: factors for layer in layers for name, factors in read_fisher(directory, layer).items()}
    return Measured(
        {name: factors.spectrum.tolist() for name, factors in found.items()},
        {name: float(factors.rounding) for name, factors in found.items() if factors.rounding is not None},
        {name: ways for layer in in_mlps for name, ways in read_narrowings(directory, layer).items()},
    )


def measured_files(walk: Walk, recipe: Recipe) -> list[str]:
    """The files that `measure_spectra` leaves in the run directory."""
    layers, in_mlps = _observed(walk, recipe)
    return [fisher_file(layer) for layer in layers] + [neurons_file(layer) for layer in in_mlps]


def _observed(walk: Walk, recipe: Recipe) -> tuple[list[Layer], list[Layer]]:
    """(the layers that are measured, those of them with MLPs from which neurons may go)."""
    layers = [layer for layer in walk.every if observable(layer)]
    return layers, [layer for layer in layers if layer.neurons] if recipe.compress.neurons else []


@dataclass
class _Measurement:
    """Forwards through the whole model, then back, a layer at a time.

    `walk` runs the blocks alone, whatever of them will be planned: an embedding and a head are part of what stands
    outside. `below` and `head` are those of them that have weights. `first` is the first block that gradients go back
    to.
    """

    walk: Walk
    directory: RunDirectory
    raw: Batches  # all of them, in the order drawn; each of several processes runs some
    order: list[int]  # their numbers in the order of the data
    recipe: Recipe
    shelf: Shelf
    first: int
    below: Layer | None
    head: Layer | None
    widths: Widths | None  # where neurons may go

    @classmethod
    def of(cls, walk: Walk, directory: RunDirectory, raw: Batches, recipe: Recipe) -> _Measurement:
        """The measurement of all layers of `walk`."""
        ends = {layer.kind: layer for layer in walk.every if layer.weights}
        blocks = [layer for layer in walk.every if layer.kind == "block"]
        inner = Walk(walk.source, blocks, blocks, walk.device, walk.progress)
        below = ends.get("embedding")
        first = 0 if below else next((i for i, layer in enumerate(blocks) if layer.weights), len(blocks))
        # Every stream is kept until the gradients come back to it.
        room = budgets(recipe.run.stream_device_memory, recipe.run.stream_memory, walk.device.device)
        beside = kept_bytes(blocks, recipe.compress.neurons is not None) if recipe.compress.fisher_inputs else 0
        place = inner.choose_place(raw, len(blocks) + 2, room, beside)
        shelf = Shelf(directory.path / FISHER / "streams", walk.device.device, place)
        # Neighbours in a text are alike: a few tokens are to be of all of it.
        order = drawn_order(len(raw), recipe.run.seed)
        drawn = [raw[number] for number in order]
        widths = None
        if (share := recipe.compress.neurons) is not None:
            widths = Widths(directory, share, rank_multiple(inner.every, recipe.compress))
        return cls(inner, directory, drawn, order, recipe, shelf, first, below, ends.get("head"), widths)

    @property
    def rounding(self) -> int:
        """Numbers to a scale, where ranks and bits share one budget, so that what few bits cost is to be known."""
        section = self.recipe.quantize
        return 0 if section is None or self.recipe.compress.size is None else section.group_size

    @property
    def neurons(self) -> bool:
        """Whether neurons may go, so that it is to be known what that would cost."""
        return self.widths is not None

    def run(self) -> None:
        """Leave what is found of every layer in the run directory."""
        progress, blocks = self.walk.progress, self.walk.layers
        self.shelf.clear_all()
        with progress.timed("sensitivity"):
            batches, streams, more = self.run_forwards()
            with progress.phase("sensitivity", len(blocks) - self.first + 1) as bar:
                gradients, tokens, tied = self.begin_at_predictions(batches, streams.pop())
                bar.advance()
                for position in range(len(blocks) - 1, self.first - 1, -1):
                    gradients = self.run_back(position, batches, (streams.pop(), gradients), tokens, more)
                    memory.give_back()
                    bar.advance()
                if self.widths is not None:
                    self.widths.finish()
            if self.below:
                self.end_at_embedding(self.below, batches, gradients, tokens, tied)
        gradients.drop()
        self.shelf.clear()

    def run_forwards(self) -> tuple[list[Batch], list[Stream], MoreInputs]:
        """The batches, the streams that enter the layers from `first` on, and the one that leaves the last.

        With what enters the weights of batches behind those.
        """
        walk, compress = self.walk, self.recipe.compress
        streams = [self.shelf.new("0000-teacher")]
        every = walk.capture_batches(
            self.raw, streams[0], compress.fisher_tokens + (compress.fisher_inputs or 0), whole=True
        )
        batches, behind = split(every, compress.fisher_tokens)
        more = MoreInputs(walk, self.shelf, behind, streams[0], self.rounding, self.neurons)
        with walk.progress.phase("the original's activations", len(walk.layers)) as bar:
            for position, layer in enumerate(walk.layers):
                with walk.open_layer(layer) as module:
                    out = self.shelf.new(f"{position + 1:04d}-teacher")
                    after = walk.run_through(module, position, batches, streams[-1], out)
                    more.run_through(module, position)
                if position < self.first:
                    streams.pop().drop()
                streams.append(after)
                memory.give_back()
                bar.advance()
        more.drop()
        return batches, streams, more

    def begin_at_predictions(self, batches: list[Batch], hidden: Stream) -> tuple[Stream, int, dict[str, Tensor]]:
        """The gradients at what leaves the last layer, of the loss on tokens drawn from the predictions; their number.

        With them what a tied head adds to its embedding; what is found of a head of its own is stored.
        """
        walk, head, device = self.walk, self.head, self.walk.device
        gradients, tokens = self.shelf.new("top-gradients"), 0
        with walk.hold_outside(predicts=True) as model, _fixed(model):  # or there is a gradient as large as the head
            listener = Listener(head, model.get_submodule(head.name), device, rounding=self.rounding) if head else None
            modules = [model.get_submodule(layer.name) for layer in walk.layers]
            forms = [walk.source.forms.get(layer.name) for layer in walk.layers]
            for batch, x in zip(batches, hidden):
                raw = self.raw[batch.number]
                # Each batch draws tokens of its own: which process runs it, and after what, changes nothing.
                generator = torch.Generator(device.device).manual_seed(self.recipe.run.seed + self.order[batch.number])
                leaf = x.detach().requires_grad_(True)
                given = {name: send(value, device.device) for name, value in arguments(raw).items()}
                at_once = positions_at_once(model, len(leaf))

                def run(keep: Tensor | None, given: Any = given) -> Predicted:
                    more = {} if keep is None else {KEEP: keep}
                    with device.autocast():
                        outputs = run_model(model, given, **more)
                    return Predicted(main_output(outputs), predicts_classes(outputs))

                with end_with(modules, forms, batch.calls[-1], leaf):
                    tokens += backward_in_chunks(run, leaf, batch.calls[-1].mask, generator, at_once)
                gradients.append(_gradient_of(leaf))
            tokens = round(ranks.summed([tokens])[0])
            tied = {}
            if listener and head:
                tied = listener.tied(tokens)
                if observable(head):
                    write_fisher(self.directory, head, listener.close(tokens))
        hidden.drop()
        return gradients, tokens, tied

    def run_back(
        self, position: int, batches: list[Batch], streams: tuple[Stream, Stream], tokens: int, more: MoreInputs
    ) -> Stream:
        """Store what the predictions are sensitive to in a layer's weights; the gradients at what enters it.

        `streams` are what entered the layer and the gradients at what left it; both are dropped.
        """
        layer, before, device = (
            self.walk.layers[position],
            self.shelf.new(f"{position:04d}-gradients"),
            self.walk.device,
        )
        with self.walk.open_layer(layer) as module:
            module.requires_grad_(False)
            listener = Listener(layer, module, device, rounding=self.rounding, neurons=self.neurons)
            for batch, x, gradient in zip(batches, *streams):
                leaf = x.detach().requires_grad_(True)
                with torch.enable_grad(), device.autocast():
                    out = batch.calls[position](module, leaf)
                out.backward(gradient.to(out.dtype))
                before.append(_gradient_of(leaf))
            if observable(layer):
                more.hand_over(position, listener)
                found = listener.close(tokens)
                if self.widths is not None and layer.neurons:
                    spectra = {name: factors.spectrum for name, factors in found.items()}
                    self.widths.add(Known(layer, listener.wholes, spectra))
                write_fisher(self.directory, layer, found)
        for stream in streams:
            stream.drop()
        return before

    def end_at_embedding(
        self, layer: Layer, batches: list[Batch], gradients: Stream, tokens: int, tied: dict[str, Tensor]
    ) -> None:
        """Store what is found of the embedding, `gradients` being those at what enters the first block."""
        entered: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            entered.append(_hand_on(*args, **kwargs))
            raise _Entered

        device = self.walk.device
        with self.walk.hold_outside(predicts=True) as model:
            floor = self.recipe.compress.embedding_floor
            listener = Listener(layer, model.get_submodule(layer.name), device, floor)
            for batch, gradient in zip(batches, gradients):
                raw = self.raw[batch.number]
                given = {name: send(value, device.device) for name, value in arguments(raw).items()}
                first = stand_in([model.get_submodule(self.walk.layers[0].name)], [record])
                with torch.enable_grad(), device.autocast(), contextlib.suppress(_Entered), first:
                    run_model(model, given)
                x = entered.pop()
                x.backward(gradient.to(x.dtype))
            write_fisher(self.directory, layer, listener.close(tokens, tied))


@contextlib.contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Let no parameter of `model` get a gradient for as long as the block lasts."""
    learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learn:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learn:
            parameter.requires_grad_(True)


def _gradient_of(leaf: Tensor) -> Tensor:
    """The gradient at a layer's input; zeros where nothing of what the layer puts out depends on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


class _Entered(Exception):  # noqa: N818  not an error: it ends the forward pass at the first block
    pass
