"""How much the model's predictions depend on every weight's errors, measured once before ranks are chosen.

For a weight y = W x and g, the gradient at a position of y of -log p(t) where t is drawn from the model's own
predictions, an error E of W costs about 1/2 sum (g^T E x)^2 of KL divergence: the Fisher information. It is kept as
two factors (K-FAC, arXiv 1503.05671), G = sum g g^T / (tokens predicted) and H = sum c x x^T / sum c, with which the
cost is about 1/2 tr(G E H E^T) nats per token. c = |g|^2 / (|g|^2 + its mean) leaves out positions that nobody attends
to (the silence after a clip); |g|^2 itself would rest on a few (docs/results/quality.md). So errors count by what they
do to the predictions, and those of different weights compare. Both are kept on the weight's smaller side, as
init.fisher wants them: G and W H W^T, or W^T G W and H.

The original runs forwards layer by layer, its streams are kept, and gradients run back through them, also layer by
layer: no more than one layer is in memory besides what stands outside them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lillama.base import memory
from lillama.contract import Layer
from lillama.distill.job import Job, captured_batches, place, through
from lillama.factorise.kfac import Listener
from lillama.factorise.statistics import FISHER, fisher_file
from lillama.plan.plan import observable
from lillama.pretrained.calls import Batch, arguments, stand_in
from lillama.pretrained.predictions import divergence, drawn
from lillama.pretrained.streams import Shelf, Stream


def measured(job: Job) -> dict[str, Tensor]:
    """The spectrum of every observed weight (see `fisher_spectrum`), measured unless that was done before."""
    layers = [layer for layer in job.plan.layers if observable(layer)]
    if not all(job.directory.has(fisher_file(layer)) for layer in layers):
        _measure(job)
    return {
        name.removesuffix(".spectrum"): tensor
        for layer in layers
        for name, tensor in job.directory.tensors(fisher_file(layer)).items()
        if name.endswith(".spectrum")
    }


def forget(job: Job) -> None:
    """Drop what was measured: the ranks are chosen and the factors begun."""
    files = [fisher_file(layer) for layer in job.plan.layers if job.directory.has(fisher_file(layer))]
    job.directory.forget(*files)
    with contextlib.suppress(OSError):  # it is not there
        (job.directory.path / FISHER).rmdir()


def _measure(job: Job) -> None:
    """Forwards, then back."""
    ends = {layer.kind: layer for layer in job.plan.layers if layer.weights}
    job = copy.copy(job)
    # All blocks have to be run, whatever of them will be planned; an embedding and a head are part of what is outside.
    job.layers = [layer for layer in job.plan.layers if layer.kind == "block"]
    job.plan = dataclasses.replace(job.plan, layers=tuple(job.layers), ranks={})
    below = ends.get("embedding")
    first = 0 if below else next((i for i, layer in enumerate(job.layers) if layer.weights), len(job.layers))
    shelf = Shelf(job.directory.path / FISHER / "streams", job.device.device, place(job, len(job.layers) + 2))
    shelf.clear()
    with job.progress.timed("sensitivity"):
        streams, batches = _forwards(job, shelf, first)
        with job.progress.phase("sensitivity", len(job.layers) - first + 1) as bar:
            gradients, tokens, tied = _top(job, shelf, batches, streams.pop(), ends.get("head"))
            bar.advance()
            for position in range(len(job.layers) - 1, first - 1, -1):
                gradients = _back(job, shelf, position, batches, streams.pop(), gradients, tokens)
                memory.give_back()
                bar.advance()
        if below:
            _bottom(job, below, batches, gradients, tokens, tied)
    gradients.drop()
    shelf.clear()


def _forwards(job: Job, shelf: Shelf, first: int) -> tuple[list[Stream], list[Batch]]:
    """The streams that enter the layers from `first` on, and the one that leaves the last."""
    batches, stream = captured_batches(job, shelf.new("0000-teacher"), job.recipe.compress.fisher_tokens)
    assert stream is not None
    streams = [stream]
    with job.progress.phase("the original's activations", len(job.layers)) as bar, torch.no_grad():
        for position, layer in enumerate(job.layers):
            with job.teacher(layer) as module:
                after = through(job, shelf, position, module, batches, streams[-1], "teacher")
            if position < first:
                streams.pop().drop()
            streams.append(after)
            memory.give_back()
            bar.advance()
    return streams, batches


@contextlib.contextmanager
def _outside(job: Job) -> Iterator[None]:
    """What stands outside the blocks, on the device."""
    outside = job.source.outside((layer.name for layer in job.layers), predicts=True)
    job.source.materialise(outside, job.device.device)
    job.source.place_buffers(job.device.device)
    try:
        yield
    finally:
        job.source.release_keys(outside)


def _top(
    job: Job, shelf: Shelf, batches: list[Batch], hidden: Stream, head: Layer | None
) -> tuple[Stream, int, dict[str, Tensor]]:
    """The gradients at what leaves the last layer, of the loss on tokens drawn from the predictions; their number.

    With them what a tied head adds to its embedding; what is found of a head of its own is stored.
    """
    generator = torch.Generator().manual_seed(job.recipe.run.seed)
    gradients, tokens = shelf.new("top-gradients"), 0
    with _outside(job):
        model = job.source.model
        listener = Listener(head, model.get_submodule(head.name), job.device) if head else None
        for raw, batch, x in zip([*job.train, *job.held], batches, hidden):
            leaf = x.detach().requires_grad_(True)
            given = {name: value.to(job.device.device) for name, value in arguments(raw).items()}
            with torch.enable_grad(), job.device.autocast(), _played(job, leaf):
                logits = model(**given, use_cache=False).logits
                logits = logits.flatten(0, -2) if batch.mask is None else logits[batch.mask.bool()]
            divergence(logits, drawn(logits, generator)).backward()
            tokens += len(logits)
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        tied = {}
        if listener and head:
            tied = listener.tied(tokens)
            if observable(head):
                job.directory.put_tensors(fisher_file(head), listener.close(tokens))
    hidden.drop()
    return gradients, tokens, tied


def _played(job: Job, leaf: Tensor) -> contextlib.AbstractContextManager[None]:
    """In the model's forward pass, let layers hand on what they get, and the last one give `leaf`."""
    modules = [job.source.model.get_submodule(layer.name) for layer in job.layers]
    return stand_in(modules, [*[_hand_on] * (len(modules) - 1), lambda *_, **__: leaf])


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _back(
    job: Job, shelf: Shelf, position: int, batches: list[Batch], inputs: Stream, gradients: Stream, tokens: int
) -> Stream:
    """Store what the predictions are sensitive to in a layer's weights; the gradients at what enters it."""
    layer, before = job.layers[position], shelf.new(f"{position:04d}-gradients")
    with job.teacher(layer) as module:
        module.requires_grad_(False)
        listener = Listener(layer, module, job.device)
        for batch, x, gradient in zip(batches, inputs, gradients):
            leaf = x.detach().requires_grad_(True)
            with torch.enable_grad(), job.device.autocast():
                out = batch.calls[position](module, leaf)
            out.backward(gradient.to(out.dtype))
            assert leaf.grad is not None
            before.append(leaf.grad)
        if observable(layer):
            job.directory.put_tensors(fisher_file(layer), listener.close(tokens))
    inputs.drop()
    gradients.drop()
    return before


def _bottom(
    job: Job, layer: Layer, batches: list[Batch], gradients: Stream, tokens: int, tied: dict[str, Tensor]
) -> None:
    """Store what is found of the embedding, `gradients` being those at what enters the first block."""
    entered: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        entered.append(_hand_on(*args, **kwargs))
        raise _Entered

    with _outside(job):
        model = job.source.model
        listener = Listener(layer, model.get_submodule(layer.name), job.device, job.recipe.compress.embedding_floor)
        for raw, _, gradient in zip([*job.train, *job.held], batches, gradients):
            given = {name: value.to(job.device.device) for name, value in arguments(raw).items()}
            first = stand_in([model.get_submodule(job.layers[0].name)], [record])
            with torch.enable_grad(), job.device.autocast(), contextlib.suppress(_Entered), first:
                model(**given, use_cache=False)
            x = entered.pop()
            x.backward(gradient.to(x.dtype))
        job.directory.put_tensors(fisher_file(layer), listener.close(tokens, tied))


class _Entered(Exception):  # noqa: N818  not an error: it ends the forward pass at the first block
    pass
