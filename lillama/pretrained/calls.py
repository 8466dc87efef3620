"""The activations that flow from layer to layer, and the calls that carry them.

A layer is driven as the model drives it: its arguments are captured once from a forward pass of the skeleton in
which the layers themselves only hand their input on, then it is called on whichever stream is wanted with
the same remaining arguments. Where in its arguments the stream goes, and where in what it returns it comes out, its
form says (forms.py). The result is bitwise that of the full forward pass (learn.py makes sure of it).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lillama.base.device import send
from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.pretrained.forms import Form, Part, pack, unpack

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


def find_mask(batch: RawBatch, shape: Sequence[int], names: Sequence[str] = MASKS) -> Tensor | None:
    """The mask of a batch's tokens of that `shape` [B, T], 1 where one counts; None: all do."""
    return next((batch[name] for name in names if name in batch and batch[name].shape == tuple(shape)), None)


@dataclass
class Call:
    """How the model called a layer, less the stream: its other arguments, flattened.

    `shapes` are those of the parts of the stream that enters, `after` of those that leave; `mask` is 1 where a token
    [B, T] counts (None: all do), `loss_mask` the same of all parts of the stream that leaves. `share`: of what counts
    in the whole batch, how much is in the rows that are here (rows.py).
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    form: Form
    shapes: tuple[tuple[int, ...], ...] = ()
    after: tuple[tuple[int, ...], ...] = ()
    mask: Tensor | None = None
    loss_mask: Tensor | None = None
    share: float = 1.0

    def __call__(self, module: nn.Module, stream: Tensor) -> Tensor:
        """Run `module` on a stream as the model would; the stream that leaves it."""
        leaves = [one.to(stream.device) if isinstance(one, Tensor) else one for one in self.leaves]
        parts = unpack(stream, self.shapes) if len(self.shapes) > 1 else [stream]
        for argument, part in self.form.takes:
            leaves[argument] = parts[part]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        out = module(*args, **kwargs)
        if self.form.spec is None:  # nobody looked at what it returns
            return out[0] if isinstance(out, tuple) else out
        returned = [out] if isinstance(out, Tensor) else pytree.tree_leaves(out)
        gives = self.form.gives
        return pack([parts[one.kept or 0] if one.made is None else returned[one.made] for one in gives])


@dataclass
class Batch:
    """One calibration batch as its layers see it, or the rows of it that are here: how each layer is called.

    `tokens` are those of the whole batch, `number` is its number among all, `before` the tokens of those before it;
    rows that do not count (`counts`) are another process's, and stand in where there are too few.
    """

    calls: list[Call]
    mask: Tensor | None  # of the first layer [B, T], 1 where a token counts; None: all do
    tokens: int
    number: int = 0
    counts: bool = True
    before: int = 0


class Stopped(Exception):  # noqa: N818  not an error: it ends the forward pass after the last layer of interest
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

    With each comes the stream that enters the first layer. Everything that is not a layer must be materialised, and so
    must layers whose form has something `computed`. Equal tensors among the arguments of the batches that are still in
    use (rotary embeddings, masks) are kept once with `park`, which is for many batches at once. A tensor that a batch
    brought along itself (encoder states) is handed on as it is; with `park` it stays where the batch had it, on the
    host, until a layer needs it.
    """

    model: nn.Module
    layers: Sequence[Layer]
    device: torch.device
    park: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)  # by name of the layer; none: hidden states in and out
    # Weak, so that what no batch uses any more is freed.
    _seen: MutableMapping[bytes, Tensor] = field(default_factory=weakref.WeakValueDictionary)
    # Of the batch at hand, by place in memory: its own tensors, and what became of those already looked at.
    _own: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, batch: RawBatch) -> tuple[Batch, Tensor]:
        there = {name: send(value, self.device) for name, value in arguments(batch).items()}
        self._own = {
            (there[name].data_ptr(), there[name].numel()): value if self.park else there[name]
            for name, value in arguments(batch).items()
            if there[name].is_contiguous()
        }
        captured: list[Call] = []
        entering: list[Tensor] = []
        modules = [self.model.get_submodule(layer.name) for layer in self.layers]
        recording = _Recording(self, batch, captured, entering, modules)
        try:
            with stand_in(modules, recording.forwards()), contextlib.suppress(Stopped):
                run_model(self.model, there)
        finally:
            self._own, self._known = {}, {}
        if len(captured) < len(self.layers):
            raise LillamaError(
                f"the model's forward pass reached {len(captured)} of the {len(self.layers)} layers listed",
                where=self.layers[len(captured)].name,
                hint="The plugin must list the layers in the order in which the model runs them.",
            )
        hidden = entering[0]
        mask, tokens = captured[0].mask, recording.tokens
        if tokens is None:
            tokens = hidden.shape[0] * hidden[0].numel() // _width(hidden)
        return Batch(captured, mask, tokens), hidden

    def once(self, tensor: Tensor) -> Tensor:
        """`tensor`, or the equal one seen before."""
        _, found = self._known.get(id(tensor), (None, None))
        if found is None:
            own = self._own.get((tensor.data_ptr(), tensor.numel())) if tensor.is_contiguous() else None
            if own is not None:
                found = own.reshape(tensor.shape)
            else:  # to hash it a device is waited for: where one batch is there at a time, nothing is kept twice
                found = self._seen.setdefault(digest(tensor), tensor) if self.park else tensor
            # The tensor is kept beside it so that its id stays its own.
            self._known[id(tensor)] = (tensor, found)
        return found


def digest(tensor: Tensor) -> bytes:
    """A hash of a tensor's numbers, type and shape."""
    flat = tensor.detach().cpu().contiguous()
    found = hashlib.blake2b(flat.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
    return found + str((tensor.dtype, tuple(tensor.shape))).encode()


def run_model(model: nn.Module, given: Mapping[str, Any], **more: Any) -> Any:
    """A forward pass without a cache of keys and values."""
    takes = inspect.signature(type(model).forward).parameters
    config: Any = model.config
    # Some take it among others that they hand on to what is inside them.
    handed_on = hasattr(config.get_text_config(), "use_cache") and any(p.kind is p.VAR_KEYWORD for p in takes.values())
    options = {"use_cache": False} if "use_cache" in takes or handed_on else {}
    return model(**given, **options, **more)


def _width(hidden: Tensor) -> int:
    """Numbers per token: an embedding's input has one, hidden states [B, T, ...] have as many as follow."""
    return 1 if hidden.dim() == 2 else hidden[0, 0].numel()


class _Recording:
    """One pass in which layers hand on what they are given, and their calls are taken down."""

    def __init__(
        self,
        capture: Capture,
        batch: RawBatch,
        captured: list[Call],
        entering: list[Tensor],
        modules: Sequence[nn.Module],
    ) -> None:
        self.capture, self.batch, self.captured, self.entering = capture, batch, captured, entering
        self.modules = modules
        self.own = [module.forward for module in modules]  # a plugin may have set one
        forms = [capture.forms.get(layer.name) for layer in capture.layers]
        self.begun = next((i for i, form in enumerate(forms) if form and form.begins), 0)  # where a decoder begins
        self.parts: list[tuple[int, ...]] = []  # shapes of what the stream consists of here
        self.tokens: int | None = None  # that count, where the batch says so
        self.sent: dict[int, Tensor] = {}  # masks of the batch on the device

    def forwards(self) -> list[Forward]:
        """What plays the layers."""
        return [self._player(number) for number in range(len(self.modules))]

    def _player(self, number: int) -> Forward:
        layer = self.capture.layers[number]

        def play(*args: Any, **kwargs: Any) -> Any:
            if number != len(self.captured):
                raise LillamaError(
                    "the model ran this layer out of the listed order",
                    where=layer.name,
                    hint="The plugin must list the layers in the order in which the model runs them, each once.",
                )
            return self._record(number, args, kwargs)

        return play

    def _record(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.capture.layers[number]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        form = self.capture.forms.get(layer.name) or _usual_form(args, kwargs)
        if not number:
            places = {part: argument for argument, part in reversed(form.takes)}
            parts = [leaves[places[part]] for part in range(len(places))]
            self.parts = [tuple(part.shape) for part in parts]
            self.entering.append(pack(parts))
        main = next((argument for _, argument in form.echoes), form.takes[0][0])
        taken = {argument for argument, _ in form.takes}
        kept = [
            None if i in taken else self.capture.once(leaf) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        mask = self._mask(number, leaves[main])
        call = Call(kept, spec, form, tuple(self.parts), mask=mask)
        self.captured.append(call)
        incoming, self.parts = self.parts, []
        masks = []
        for part in form.gives:
            echo = dict(form.echoes).get(-1 if part.made is None else part.made, main)
            self.parts.append(incoming[part.kept or 0] if part.made is None else tuple(leaves[echo].shape))
            masks.append(
                self._part_mask(self.parts[-1], mask, counts=part.made is not None, device=leaves[main].device)
            )
        call.after = tuple(self.parts)
        if len({len(one) for one in masks}) > 1:  # as `pack` does
            masks = [one.reshape(1, -1) for one in masks]
        call.loss_mask = mask if len(masks) < 2 else torch.cat(masks, 1)
        if len(self.captured) == len(self.modules):
            raise Stopped
        if layer.kind == "embedding":
            weight = cast(nn.Embedding, self.modules[number]).weight
            hidden = leaves[main]
            return torch.zeros(*hidden.shape, weight.shape[1], device=hidden.device, dtype=weight.dtype)
        if form.spec is None:
            return leaves[main]
        return give_back(form, leaves, {}, self._computed(number, form, args, kwargs))

    def _computed(self, number: int, form: Form, args: Any, kwargs: Any) -> dict[int, Any]:
        """Output leaves that no token has an influence on, which the layer itself must say."""
        if not form.computed:
            return {}
        module, own = self.modules[number], self.own[number]
        with play_by(module, own):
            returned = pytree.tree_leaves(module(*args, **kwargs))
        return {leaf: returned[leaf] for leaf in form.computed}

    def _mask(self, number: int, hidden: Any) -> Tensor | None:
        if not isinstance(hidden, Tensor):
            return None
        names: Sequence[str] = MASKS
        if self.begun:  # an encoder's tokens are others than its decoder's
            names = MASKS[-1:] if number < self.begun else MASKS[:-1]
        found = find_mask(self.batch, hidden.shape[:2], names)
        if not number:
            self.tokens = None if found is None else int(found.sum())  # where the batch has it: on the host
        if found is not None and id(found) not in self.sent:
            self.sent[id(found)] = send(found, hidden.device)
        return None if found is None else self.sent[id(found)]

    @staticmethod
    def _part_mask(shape: tuple[int, ...], mask: Tensor | None, counts: bool, device: torch.device) -> Tensor:
        """The mask [B, n] of a part of the stream: what a layer only hands on does not count for it."""
        tokens = torch.Size(shape[1:-1]).numel() if len(shape) > 2 else 1
        if not counts:
            return torch.zeros(shape[0], tokens, device=device)
        if mask is None or tokens % mask.shape[1]:
            return torch.ones(shape[0], tokens, device=device)
        return mask.repeat_interleave(tokens // mask.shape[1], 1).to(torch.float32)


def _usual_form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """Hidden states are the first argument, or the one called so, and what comes back."""
    if args:
        return Form(((0, 0),), (Part(made=0),))
    before = itertools.takewhile(lambda name: name != HIDDEN, kwargs)
    place = len(pytree.tree_leaves([kwargs[name] for name in before]))
    return Form(((place, 0),), (Part(made=0),))


def give_back(form: Form, arguments: Sequence[Any], made: Mapping[int, Tensor], computed: Mapping[int, Any]) -> Any:
    """What a layer of that form returns, if it `made` these output leaves; others are what it was given, or zeros."""
    if form.spec is None:
        return next(iter(made.values()))
    echoes, passes = dict(form.echoes), dict(form.passes)
    batch = next((arguments[a].shape[0] for _, a in form.echoes), None)
    leaves = []
    for number, leaf in enumerate(form.outputs):
        if number in made:
            leaves.append(made[number])
        elif number in computed:
            leaves.append(computed[number])
        elif number in echoes or number in passes:
            leaves.append(arguments[echoes.get(number, passes.get(number, 0))])
        elif leaf.value is None:
            leaves.append(leaf.said)
        else:
            like = next(a for a in arguments if isinstance(a, Tensor))
            shape = (batch or leaf.shape[0], *leaf.shape[1:]) if leaf.shape else ()
            leaves.append(torch.zeros(shape, dtype=leaf.dtype, device=like.device))
    return pytree.tree_unflatten(leaves, form.spec)
