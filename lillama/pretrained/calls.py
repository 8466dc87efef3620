"""The activations that flow from layer to layer, and the calls that carry them.

A layer is driven as the model drives it: its arguments are captured once from a forward pass of the skeleton in
which the layers themselves only hand their input on, then it is called on whichever stream is wanted with
the same remaining arguments. The result is bitwise that of the full forward pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lillama.contract import Layer
from lillama.errors import LillamaError

HIDDEN = "hidden_states"
# What a batch may hold besides the model's arguments (hookspecs.calibration_stream).
BESIDES = ("loss_mask", "digest")
# What says which of a batch's tokens count; the first that is there and has their shape.
MASKS = ("loss_mask", "decoder_attention_mask", "attention_mask")

RawBatch = Mapping[str, Tensor]  # the model's arguments, and what stands BESIDES them
Batches = Sequence[RawBatch]


def arguments(batch: RawBatch) -> dict[str, Tensor]:
    """The arguments of the model's forward pass in a batch."""
    return {name: value for name, value in batch.items() if name not in BESIDES}


def find_mask(batch: RawBatch, shape: Sequence[int]) -> Tensor | None:
    """The mask of a batch's tokens of that `shape` [B, T], 1 where one counts; None: all do."""
    return next((batch[name] for name in MASKS if name in batch and batch[name].shape == tuple(shape)), None)


@dataclass
class Call:
    """How the model called a layer, less the hidden states: further arguments and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # whether the hidden states were passed by keyword

    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run `module` on `hidden` as the model would; the first output where it returns several."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(hidden.device), (self.args, self.kwargs))
        out = module(*args, **kwargs, **{HIDDEN: hidden}) if self.keyword else module(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Batch:
    """One calibration batch as its layers see it: how each of them is called."""

    calls: list[Call]
    mask: Tensor | None  # [B, T], 1 where a token counts; None: all do
    tokens: int


class _Stop(Exception):  # noqa: N818  not an error: it ends the forward pass after the last layer of interest
    pass


Forward = Callable[..., Any]


@contextlib.contextmanager
def play_by(module: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Let `forward` play `module` for as long as the block lasts; None: what its class defines."""
    before = module.__dict__.pop("forward", None)  # a plugin may have set one
    if forward is not None:
        module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before


@contextlib.contextmanager
def stand_in(modules: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Let `forwards` play `modules`, for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        for module, forward in zip(modules, forwards):
            stack.enter_context(play_by(module, forward))
        yield


@dataclass
class Capture:
    """Turns batches of model arguments into `Batch`es, for the layers `layers` of the skeleton `model`.

    With each comes the first layer's input. Everything that is not a layer must be materialised. Equal tensors among
    the arguments of the batches that are still in use (rotary embeddings, masks) are kept once. A tensor that a batch
    brought along itself (encoder states) is handed on as it is; with `park` it stays where the batch had it, on the
    host, until a layer needs it.
    """

    model: nn.Module
    layers: Sequence[Layer]
    device: torch.device
    park: bool = False
    # Weak, so that what no batch uses any more is freed.
    _seen: MutableMapping[bytes, Tensor] = field(default_factory=weakref.WeakValueDictionary)
    # Of the batch at hand, by place in memory: its own tensors, and what became of those already looked at.
    _own: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, batch: RawBatch) -> tuple[Batch, Tensor]:
        there = {name: value.to(self.device) for name, value in arguments(batch).items()}
        self._own = {
            (there[name].data_ptr(), there[name].numel()): value if self.park else there[name]
            for name, value in arguments(batch).items()
            if there[name].is_contiguous()
        }
        captured: list[tuple[Tensor, Call]] = []
        try:
            with self._recording(captured), contextlib.suppress(_Stop):
                self.model(**there, use_cache=False)
        finally:
            self._own, self._known = {}, {}
        if len(captured) < len(self.layers):
            raise LillamaError(
                f"the model's forward pass reached {len(captured)} of the {len(self.layers)} layers listed",
                where=self.layers[len(captured)].name,
                hint="The plugin must list the layers in the order in which the model runs them.",
            )
        hidden = captured[0][0]
        mask = find_mask(batch, hidden.shape[:2])
        mask = mask if mask is None else mask.to(hidden.device)
        tokens = int(mask.sum()) if mask is not None else hidden.shape[0] * hidden.shape[1]
        return Batch([call for _, call in captured], mask, tokens), hidden

    def _recording(self, captured: list[tuple[Tensor, Call]]) -> contextlib.AbstractContextManager[None]:
        modules = [self.model.get_submodule(layer.name) for layer in self.layers]
        return stand_in(
            modules, [self._recorder(layer, module, captured) for layer, module in zip(self.layers, modules)]
        )

    def _recorder(self, layer: Layer, module: nn.Module, captured: list[tuple[Tensor, Call]]) -> Any:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            position = len(captured)
            if position >= len(self.layers) or self.layers[position] is not layer:
                raise LillamaError(
                    "the model ran this layer out of the listed order",
                    where=layer.name,
                    hint="The plugin must list the layers in the order in which the model runs them.",
                )
            keyword = not args
            hidden, rest = (kwargs.pop(HIDDEN), ()) if keyword else (args[0], args[1:])
            rest, kwargs = pytree.tree_map_only(Tensor, self._once, (rest, kwargs))
            captured.append((hidden, Call(rest, kwargs, keyword)))
            if len(captured) == len(self.layers):
                raise _Stop
            if layer.kind == "embedding":
                weight = cast(nn.Embedding, module).weight
                return torch.zeros(*hidden.shape, weight.shape[1], device=hidden.device, dtype=weight.dtype)
            return hidden

        return record

    def _once(self, tensor: Tensor) -> Tensor:
        """`tensor`, or the equal one seen before."""
        _, found = self._known.get(id(tensor), (None, None))
        if found is None:
            own = self._own.get((tensor.data_ptr(), tensor.numel())) if tensor.is_contiguous() else None
            found = self._equal(tensor) if own is None else own.reshape(tensor.shape)
            # The tensor is kept beside it so that its id stays its own.
            self._known[id(tensor)] = (tensor, found)
        return found

    def _equal(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu().contiguous()
        digest = hashlib.blake2b(flat.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
        key = digest + str((tensor.dtype, tuple(tensor.shape))).encode()
        return self._seen.setdefault(key, tensor)
