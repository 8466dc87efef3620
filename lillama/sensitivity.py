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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama import memory
from lillama.contract import Layer
from lillama.device import Device
from lillama.errors import LillamaError
from lillama.factors import dense
from lillama.init import TINY, fisher_spectrum
from lillama.job import FISHER, Job, captured_batches, fisher_file, place, through
from lillama.plan import Plan, observable
from lillama.recipe import Recipe
from lillama.shelf import Shelf, Stream
from lillama.streams import Batch, arguments, stand_in
from lillama.student import fisher_factors, relative


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


def check(plan: Plan, recipe: Recipe) -> None:
    """LillamaError where the recipe's initialiser wants what is measured here and a planned weight cannot have it."""
    if not fisher_factors(recipe):
        return
    known = {weight.name for layer in plan.layers for weight in observable(layer)}
    if other := next((name for name in plan.ranks if name not in known), None):
        raise LillamaError(
            f"init: {recipe.compress.init} serves linears inside of blocks, and '{other}' is none",
            where="compress.init",
            hint="Use init: whitened, or list it under compress.skip.",
        )


def _measure(job: Job) -> None:
    """Forwards, then back."""
    job = copy.copy(job)
    # All blocks have to be run, whatever of them will be planned; an embedding and a head are part of what is outside.
    job.layers = [layer for layer in job.plan.layers if layer.kind == "block"]
    job.plan = dataclasses.replace(job.plan, layers=tuple(job.layers), ranks={})
    first = next(i for i, layer in enumerate(job.layers) if observable(layer))
    shelf = Shelf(job.directory.path / FISHER / "streams", job.device.device, place(job, len(job.layers) + 2))
    shelf.clear()
    with job.progress.timed("sensitivity"):
        streams, batches = _forwards(job, shelf, first)
        with job.progress.phase("sensitivity", len(job.layers) - first + 1) as bar:
            gradients, tokens = _top(job, shelf, batches, streams.pop())
            bar.advance()
            for position in range(len(job.layers) - 1, first - 1, -1):
                gradients = _back(job, shelf, position, batches, streams.pop(), gradients, tokens)
                memory.give_back()
                bar.advance()
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


def _top(job: Job, shelf: Shelf, batches: list[Batch], hidden: Stream) -> tuple[Stream, int]:
    """The gradients at what leaves the last layer, of the loss on tokens drawn from the predictions; their number."""
    outside = job.source.outside((layer.name for layer in job.layers), predicts=True)
    job.source.materialise(outside, job.device.device)
    job.source.place_buffers(job.device.device)
    generator = torch.Generator().manual_seed(job.recipe.run.seed)
    gradients, tokens = shelf.new("top-gradients"), 0
    try:
        for raw, batch, x in zip([*job.train, *job.held], batches, hidden):
            leaf = x.detach().requires_grad_(True)
            given = {name: value.to(job.device.device) for name, value in arguments(raw).items()}
            with torch.enable_grad(), job.device.autocast(), _played(job, leaf):
                logits = job.source.model(**given, use_cache=False).logits
                logits = logits.flatten(0, -2) if batch.mask is None else logits[batch.mask.bool()]
            loss, count = _surprise(logits, generator)
            loss.backward()
            tokens += count
            assert leaf.grad is not None
            gradients.append(leaf.grad)
    finally:
        job.source.release_keys(outside)
    hidden.drop()
    return gradients, tokens


def _surprise(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """(-log p summed over tokens drawn from the predictions [N, V], N)."""
    chances = logits.detach().float().softmax(-1)
    drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(logits.device)
    return F.cross_entropy(logits.float(), drawn, reduction="sum"), len(drawn)


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
        listener = _Listener(layer, module, job.device)
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


class _Listener:
    """Sums both factors of a layer's linears while it runs back. Gradients at padding are 0."""

    def __init__(self, layer: Layer, module: nn.Module, device: Device) -> None:
        self.layer, self.module, self.device = layer, module, device
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.counted: dict[str, float] = {}  # sum of c
        self.hooks = [
            module.get_submodule(relative(weight, layer)).register_forward_hook(self._at(weight.name))
            for weight in observable(layer)
        ]

    def _at(self, name: str) -> Any:
        def hook(linear: Any, args: tuple[Any, ...], out: Tensor) -> None:
            # What an encoder's keys and values are made of does not depend on the layer's input.
            source = out if out.requires_grad else out.requires_grad_(True)
            source.register_hook(lambda gradient: self._add(name, linear, args[0], gradient))

        return hook

    def _add(self, name: str, linear: Any, x: Tensor, gradient: Tensor) -> None:
        g, x = (t.detach().reshape(-1, t.shape[-1]) for t in (gradient, x))
        d_out, d_in = linear.weight.shape
        with self.device.autocast():
            if d_out <= d_in:
                x = F.linear(x.to(linear.weight.dtype), linear.weight)
            else:
                g = F.linear(g.to(linear.weight.dtype), linear.weight.T)
        length = gradient.detach().float().reshape(-1, d_out).square().sum(-1, keepdim=True)
        counts = length / (length + length.mean().clamp_min(TINY))
        g, x = g.float(), x.float()
        with torch.autocast(g.device.type, enabled=False):
            found = (x * counts).T @ x, g.T @ g
        if name in self.sums:
            found = tuple(old.add_(new) for old, new in zip(self.sums[name], found))  # type: ignore[assignment]
        self.sums[name] = found
        self.counted[name] = self.counted.get(name, 0.0) + float(counts.sum())

    def close(self, tokens: int) -> dict[str, Tensor]:
        """What `fisher_file` holds of every weight."""
        for hook in self.hooks:
            hook.remove()
        found = {}
        for weight in observable(self.layer):
            inputs, outputs = self.sums[weight.name]
            inputs, outputs = inputs / max(self.counted[weight.name], TINY), outputs / tokens
            W = dense(self.module, relative(weight, self.layer), weight.kind)
            found[f"{weight.name}.input"], found[f"{weight.name}.output"] = inputs, outputs
            found[f"{weight.name}.spectrum"] = fisher_spectrum(W, inputs, outputs)
        return found
