"""How layers take the stream in and give it back, found by looking at one real forward pass.

Most blocks take hidden states first and return hidden states. Others return tuples or classes, take a second value
from the block before (a residual of its own), or a value from far below (a decoder's blocks take what the encoder
gave). A layer's arguments and what it returns are flattened to lists of leaves; its form says which arguments are
parts of the stream, and which leaves of its output the stream consists of afterwards. Values are known again by a hash
of their content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lillama.contract import Layer
from lillama.errors import LillamaError

Value = bytes  # what a tensor is known again by
HINT = "A plugin of your own may list other layers (docs/plugins.md); compress.skip does not help here."


@dataclass(frozen=True)
class Leaf:
    """One argument or output of a layer in the pass that was watched; `value` is None where it is no tensor."""

    value: Value | None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    said: Any = None  # itself, where it is no tensor

    @property
    def flows(self) -> bool:
        """Whether it may be part of a stream: numbers that a gradient can go back through."""
        return self.dtype is not None and self.dtype.is_floating_point and len(self.shape) > 1


@dataclass(frozen=True)
class Record:
    """How one layer was called, and what it returned."""

    layer: Layer
    arguments: tuple[Leaf, ...]
    spec: pytree.TreeSpec
    outputs: tuple[Leaf, ...]
    output_spec: pytree.TreeSpec


@dataclass(frozen=True)
class Part:
    """One value in the stream behind a layer: an output leaf that it `made`, or an incoming part that it `kept`."""

    made: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class Form:
    """How a layer takes the stream in and gives it back.

    `takes` are pairs (argument, incoming part), `gives` the outgoing parts. `echoes` are pairs (output leaf, argument
    of the same shape, which stands for it while calls are captured); `passes` are pairs (output leaf, argument that it
    is); `computed` are output leaves that other layers take and no token has an influence on: while calls are captured
    the layer itself is run for them.
    """

    takes: tuple[tuple[int, int], ...]
    gives: tuple[Part, ...]
    outputs: tuple[Leaf, ...] = ()
    spec: pytree.TreeSpec | None = None
    echoes: tuple[tuple[int, int], ...] = ()
    passes: tuple[tuple[int, int], ...] = ()
    computed: frozenset[int] = frozenset()
    begins: bool = False  # whether what it makes is new: the first block of a decoder behind an encoder


def pack(parts: Sequence[Tensor]) -> Tensor:
    """One stream tensor of several values [B, ..., D]: B x (tokens of all) x (the widest D).

    Values [T, B, D] whose lengths differ have no first dimension in common: 1 x (tokens of all) x D.
    """
    if len(parts) == 1:
        return parts[0]
    widest = max(part.shape[-1] for part in parts)
    if len({part.shape[0] for part in parts}) > 1:
        parts = [part[None] for part in parts]
    flat = [part.flatten(1, -2) if part.dim() > 2 else part[:, None] for part in parts]
    return torch.cat([torch.nn.functional.pad(one, (0, widest - one.shape[-1])) for one in flat], 1)


def unpack(stream: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The values that `pack` made one of."""
    if len(shapes) == 1:
        return [stream]
    first = 0 if len({shape[0] for shape in shapes}) > 1 else 1
    lengths = [torch.Size(shape[first:-1]).numel() for shape in shapes]
    return [one[..., : shape[-1]].reshape(shape) for one, shape in zip(stream.split(lengths, 1), shapes)]


def find_forms(records: Sequence[Record], other: Sequence[Record] | None = None) -> dict[str, Form]:
    """The form of every layer, by name, from one forward pass; `other` is a pass of the same shapes, other tokens.

    Raises LillamaError where the layers cannot be driven one by one.
    """
    return _Finder(records, other).forms()


@dataclass
class _Finder:
    records: Sequence[Record]
    other: Sequence[Record] | None
    made_by: dict[Value, tuple[int, int]] = field(default_factory=dict)  # the layer and the output leaf
    last_use: dict[Value, int] = field(default_factory=dict)
    fixed: set[Value] = field(default_factory=set)  # values that no token has an influence on

    def forms(self) -> dict[str, Form]:
        given: set[Value] = set()
        for i, record in enumerate(self.records):
            given |= {leaf.value for leaf in record.arguments if leaf.value}
            for value in {leaf.value for leaf in record.arguments if leaf.value} & self.made_by.keys():
                self.last_use[value] = i
            for number, leaf in enumerate(record.outputs):
                if leaf.value and leaf.value not in given and leaf.value not in self.made_by:
                    self.made_by[leaf.value] = (i, number)
        used = {value for value in self.made_by if value in self.last_use}
        if self.other:
            self.fixed = {v for v in used if self.other[self.made_by[v][0]].outputs[self.made_by[v][1]].value == v}
        flowing = used - self.fixed
        last = len(self.records) - 1
        ending = self._ending(flowing)
        live: list[list[Value]] = [
            self._ordered(
                {v for v in flowing if self.made_by[v][0] <= i < self.last_use[v]} | (ending if i == last else set())
            )
            for i in range(len(self.records))
        ]
        found: dict[str, Form] = {}
        before = self._first_values(live)
        for i, record in enumerate(self.records):
            found[record.layer.name] = self._form(i, before, live[i])
            before = live[i]
        return found

    def _ordered(self, values: set[Value]) -> list[Value]:
        return sorted(values, key=lambda v: (-self.made_by[v][0], self.made_by[v][1]))

    def _ending(self, flowing: set[Value]) -> set[Value]:
        """What the last layer puts out: the leaves that flow from the layer before, if it is of the same kind."""
        record = self.records[-1]
        leaves = [n for v, (i, n) in self.made_by.items() if i == len(self.records) - 2 and v in flowing]
        if len(self.records) < 2 or self.records[-2].output_spec != record.output_spec or not leaves:
            leaves = [n for n, leaf in enumerate(record.outputs) if leaf.flows][:1]
        found = {record.outputs[n].value for n in leaves if record.outputs[n].flows}
        for n in leaves:  # where the last layer changes nothing, it still gives it
            value = record.outputs[n].value
            if value and value not in self.made_by:
                self.made_by[value] = (len(self.records) - 1, n)
        if not found:
            raise LillamaError("this layer returns no hidden states", where=record.layer.name, hint=HINT)
        return {value for value in found if value}

    def _first_values(self, live: list[list[Value]]) -> list[Value]:
        """What enters the first layer: where the second takes what the first made, the first was given such too."""
        first = self.records[0]
        if len(self.records) > 1 and first.spec == self.records[1].spec:
            places = {leaf.value: n for n, leaf in enumerate(self.records[1].arguments) if leaf.value}
            found = [first.arguments[places[v]] for v in live[0] if v in places]
            values = [leaf.value for leaf in found if leaf.value and leaf.flows]
            if values:
                return list(dict.fromkeys(values))
        value = next(
            (leaf.value for leaf in first.arguments if leaf.value and (leaf.flows or first.layer.kind == "embedding")),
            None,
        )
        if value is None:
            raise LillamaError("this layer is given no hidden states", where=first.layer.name, hint=HINT)
        return [value]

    def _form(self, i: int, before: list[Value], after: list[Value]) -> Form:
        record = self.records[i]
        places: dict[Value, list[int]] = {}
        for n, leaf in enumerate(record.arguments):
            if leaf.value:
                places.setdefault(leaf.value, []).append(n)
        takes = tuple((n, part) for part, value in enumerate(before) for n in places.get(value, []))
        if not takes:
            raise LillamaError(
                "what the layer before puts out does not reach this one unchanged: the model does more between them",
                where=record.layer.name,
                hint=HINT,
            )
        gives = []
        for value in after:
            made = self.made_by.get(value)
            if made and made[0] == i:
                gives.append(Part(made=made[1]))
            else:
                gives.append(Part(kept=before.index(value)))
        if len(gives) > 1 and (strange := next((v for v in after if not self._leaf(v).flows), None)):
            raise LillamaError(
                f"a value of shape {self._leaf(strange).shape} goes from layer to layer beside the hidden states, "
                "which depends on them and is no such thing itself",
                where=self.records[self.made_by[strange][0]].layer.name,
                hint=HINT,
            )
        passes = [(n, places[leaf.value][0]) for n, leaf in enumerate(record.outputs) if leaf.value in places]
        computed = {n for v, (layer, n) in self.made_by.items() if layer == i and v in self.fixed}
        echoes = [(part.made, self._echo(i, part.made)) for part in gives if part.made is not None]
        taken = {n for n, _ in takes}
        begins = i > 0 and bool(echoes) and all(echo not in taken for _, echo in echoes)
        return Form(
            takes, tuple(gives), record.outputs, record.output_spec,
            tuple((made, echo) for made, echo in echoes if echo is not None),
            tuple(passes), frozenset(computed), begins,
        )  # fmt: skip

    def _leaf(self, value: Value) -> Leaf:
        layer, number = self.made_by[value]
        return self.records[layer].outputs[number]

    def _echo(self, i: int, leaf: int) -> int | None:
        """The argument of the same shape as an output leaf: where the next layer takes that leaf, if it can be."""
        record = self.records[i]
        out = record.outputs[leaf]
        fitting = [n for n, one in enumerate(record.arguments) if one.flows and one.shape == out.shape]
        after = self.records[i + 1] if i + 1 < len(self.records) else None
        if after and after.spec == record.spec:
            fitting.sort(key=lambda n: after.arguments[n].value != out.value)
        return fitting[0] if fitting else None
