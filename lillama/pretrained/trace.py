"""Finds a model's layers and weights by looking at one forward pass of a small copy: no table of architectures.

Blocks are the elements of lists of modules that run once each, in order, every one on what the one before it put out
(forms.py says whether that is so). Their linears are grouped by the input they share. Where lists follow each other,
an encoder's and a decoder's, they are one stream if the second takes what the first gave.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lillama.contract import Layer, Weight
from lillama.dense.experts import experts_layout, why_not
from lillama.dense.plain import is_linear
from lillama.errors import LillamaError
from lillama.pretrained.calls import Capture, digest, run_model
from lillama.pretrained.driven import check_calls
from lillama.pretrained.examples import arguments_to_try, copies
from lillama.pretrained.forms import Leaf, Record, find_forms
from lillama.pretrained.neurons import with_neurons
from lillama.pretrained.players import main_output

log = logging.getLogger(__name__)
NO_LINEAR = "none of them holds a linear layer, or experts, of a kind that can be factorised"
BRIDGE = 4  # modules between two lists of blocks, at most
NARROW = 64  # times longer than wide: a router, or a vector


@dataclass
class Run:
    """One forward pass: what every module was called with, in order."""

    model: nn.Module
    given: Mapping[str, Tensor] = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)  # when a module was first called
    kept: list[Any] = field(default_factory=list)  # tensors without numbers are told by themselves: they must live

    def leaf(self, value: Any) -> Leaf:
        if not isinstance(value, Tensor):
            return Leaf(None, said=None)
        if value.is_meta:
            self.kept.append(value)
            return Leaf(str(id(value)).encode(), tuple(value.shape), value.dtype)
        return Leaf(digest(value), tuple(value.shape), value.dtype)


def trace(model: Any) -> list[Layer]:
    """The layers of `model` (a skeleton; its weights are not looked at) in the order they run, with their weights.

    Raises LillamaError, with the reason, where no blocks are found that could be run one by one.
    """
    run, other = watch_passes(model)
    lists = _lists(run)
    if not lists:
        raise LillamaError(
            f"{type(model).__name__} has no list of blocks that run once each, one after the other", where="plugin"
        )
    reasons: list[str] = []
    names = _longest_stream(run, other, lists, reasons)
    if not names:
        raise LillamaError(
            f"the blocks of {type(model).__name__} cannot be run one by one: {reasons[0] if reasons else NO_LINEAR}",
            where="plugin",
        )
    layers = _Weights(model, run, names).layers()
    if other is None:  # no numbers to try anything on
        return layers
    tried = [name for name in names if name in run.records]
    return with_neurons(model, layers, run.model, tried, lambda one: main_output(run_model(one, run.given)))


def watch_passes(model: Any) -> tuple[Run, Run | None]:
    """A pass of a copy that runs, and one on other arguments of the same shapes."""
    trouble: Exception | None = None
    for made in copies(model):
        for given in arguments_to_try(made):
            try:
                run = _watched(made, given)
            except Exception as error:  # a model's own code may raise anything on what it does not take
                trouble = trouble or error
                continue
            other = {
                k: v if "mask" in k else v * 0.5 if v.is_floating_point() else v.roll(1, -1) for k, v in given.items()
            }
            return run, None if next(made.parameters()).is_meta else _watched(made, other)
    raise LillamaError(
        f"no arguments were found on which {type(model).__name__} runs: {type(trouble).__name__}: {trouble}",
        where="plugin",
        hint="Write a plugin that lists its layers (docs/plugins.md).",
    )


@torch.no_grad()
def _watched(model: nn.Module, given: Mapping[str, Tensor]) -> Run:
    run = Run(model, given)
    hooks: list[Any] = []
    pending: dict[str, list[tuple[tuple[Leaf, ...], Any]]] = {}

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            run.order.setdefault(name, len(run.order))
            leaves, spec = pytree.tree_flatten((args, kwargs))
            pending.setdefault(name, []).append((tuple(map(run.leaf, leaves)), spec))

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            leaves, spec = pytree.tree_flatten(out)
            arguments, called = pending[name].pop()
            record = Record(Layer(name), arguments, called, tuple(map(run.leaf, leaves)), spec)
            run.records.setdefault(name, []).append(record)

        return hook

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name)))
    device = next(model.parameters()).device
    try:
        run_model(model, {key: value.to(device) for key, value in given.items()})
    finally:
        for one in hooks:
            one.remove()
    return run


def _lists(run: Run) -> list[list[str]]:
    """The names of the elements of every list of blocks, none inside a block of another, in the order they run."""
    found: list[tuple[int, list[str]]] = []
    for name, module in run.model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            name.startswith(f"{one}.") for _, block in found for one in block
        ):
            continue
        elements = [f"{name}.{child}" for child, _ in module.named_children()]
        called = [one for one in elements if one in run.order]
        once = all(len(run.records.get(one, [])) == 1 for one in called)
        in_order = [*called] == sorted(called, key=lambda one: run.order[one])
        if called and len(called) == len(elements) and once and in_order:
            found.append((run.order[called[0]], elements))
    return [elements for _, elements in sorted(found)]


def _size(run: Run, elements: Sequence[str]) -> int:
    return sum(p.numel() for one in elements for p in run.model.get_submodule(one).parameters())


def _longest_stream(run: Run, other: Run | None, lists: list[list[str]], reasons: list[str]) -> list[str]:
    """The names of the layers of the stream with the most parameters: one list, or several that follow each other."""
    good: list[list[str]] = []
    for elements in lists:
        if not any(_holds_weights(run.model.get_submodule(one)) for one in elements):
            continue
        if (trouble := _trouble(run, other, elements)) is None:
            good.append(elements)
        else:
            reasons.append(trouble)
    streams: list[list[str]] = []
    for elements in good:
        joined = None
        for stream in sorted(streams, key=lambda one: -_size(run, one)):
            joined = joined or join(run, other, stream, elements)
        streams.append(joined or elements)
    return max(streams, key=lambda one: _size(run, one), default=[])


def _trouble(run: Run, other: Run | None, names: Sequence[str]) -> str | None:
    """Why layers cannot be run one by one; None: they can."""
    try:
        records = [run.records[name][0] for name in names]
        forms = find_forms(records, [other.records[name][0] for name in names] if other else None)
        if other is not None:  # there are numbers to compare
            layers = [record.layer for record in records]
            device = next(run.model.parameters()).device
            batch, _ = Capture(run.model, layers, device, forms=forms)(run.given)
            check_calls(batch.calls, records)
    except LillamaError as error:
        return f"{error.where}: {error.what}"
    return None


def join(run: Run, other: Run | None, first: list[str], second: list[str]) -> list[str] | None:
    """Two lists as one stream, with what stands between them, if the second takes what the first gave."""
    bridge: list[str] = []
    taken = {leaf.value for name in second for leaf in run.records[name][0].arguments if leaf.value}
    given = {leaf.value for leaf in run.records[first[-1]][0].outputs if leaf.flows}
    inside = tuple(f"{name}." for name in (*first, *second))
    for _ in range(BRIDGE + 1):
        if given & taken:
            whole = [*first, *bridge, *second]
            return whole if _trouble(run, other, whole) is None else None
        after = run.order[bridge[-1] if bridge else first[-1]]
        step = next(
            (
                name
                for name in run.order
                if run.order[name] > after
                and len(run.records[name]) == 1
                and name not in second
                and not name.startswith(inside)
                and not any(one.startswith(f"{name}.") for one in (*first, *second))
                and {leaf.value for leaf in run.records[name][0].arguments if leaf.value} & given
                and not given >= {leaf.value for leaf in run.records[name][0].outputs if leaf.value}
            ),
            None,
        )
        if step is None:
            return None
        bridge.append(step)
        given = {leaf.value for leaf in run.records[step][0].outputs if leaf.flows}
    return None


def _holds_weights(module: nn.Module) -> bool:
    return any(is_linear(one) or experts_layout(one) is not None for one in module.modules())


@dataclass
class _Weights:
    """What may be factorised inside the layers of a stream."""

    model: Any
    run: Run
    names: Sequence[str]

    def layers(self) -> list[Layer]:
        """The layers of the whole model: those that a copy of less depth lacks are like the ones it has."""
        self.shared = self._shared()
        self.patterns: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        found = []
        for name in self._all_names():
            weights = self._of(name)
            found.append(Layer(name, tuple(weights)))
        return found

    def _all_names(self) -> Iterator[str]:
        """The names of the stream's layers in the whole model."""
        done: set[str] = set()
        for name in self.names:
            parent, _, child = name.rpartition(".")
            if not child.isdigit() or not isinstance(self.model.get_submodule(parent), nn.ModuleList):
                yield name
            elif parent not in done:
                done.add(parent)
                yield from (f"{parent}.{one}" for one, _ in self.model.get_submodule(parent).named_children())

    def _shared(self) -> set[str]:
        """Modules that have a parameter with several names."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {name.rpartition(".")[0] for group in names.values() if len(group) > 1 for name in group}

    def _of(self, layer: str) -> list[Weight]:
        like = layer if layer in self.run.records else self._like(layer)
        groups: dict[Any, list[str]] = {}
        narrow = self._experts(layer)
        weights: list[Weight] = []
        for relative in sorted(self._candidates(like), key=lambda one: self.run.order[f"{like}.{one}"]):
            name = f"{layer}.{relative}"
            module = self.model.get_submodule(name)
            if name in self.shared:
                continue
            if experts_layout(module) is not None:
                weights.extend(Layer.of_experts(self.model, name))
            elif self._is_wide(module, narrow):
                first = self.run.records[f"{like}.{relative}"][0].arguments[0].value
                groups.setdefault(first, []).append(relative)
        linears = Layer.of_linears(self.model, layer, list(groups.values())).weights if groups else ()
        found = [*linears, *weights]
        when = {
            f"{layer}.{one[len(like) + 1 :]}": at for one, at in self.run.order.items() if one.startswith(f"{like}.")
        }
        return sorted(found, key=lambda one: when.get(one.group or one.name, when.get(one.name.rpartition(".")[0], 0)))

    def _candidates(self, like: str) -> Iterator[str]:
        """Modules inside a block that may be factorised, as far as the pass called each once with one input."""
        inside: list[str] = []
        for relative, module in self.run.model.get_submodule(like).named_modules():
            name = f"{like}.{relative}"
            if not relative or any(relative.startswith(f"{one}.") for one in inside):
                continue
            if experts_layout(module) is not None:
                inside.append(relative)
                if name in self.run.records:
                    yield relative
            elif reason := why_not(module):
                log.warning("%s stays dense: %s", name, reason)
            elif is_linear(module) and name in self.run.records:
                yield relative

    def _experts(self, layer: str) -> set[int]:
        """How many experts a block has: what is as wide is a router."""
        found = set()
        for module in self.model.get_submodule(layer).modules():
            if (layout := experts_layout(module)) is not None:
                found.add(layout.weight(module, "down").shape[0])
        return found

    @staticmethod
    def _is_wide(module: Any, routers: set[int]) -> bool:
        shape = (module.weight.shape[0], module.weight.shape[1])
        return not set(shape) & routers and max(shape) < NARROW * min(shape)

    def _like(self, layer: str) -> str:
        """A block of the copy that has the same modules as one that the copy lacks."""
        wanted = [(name, type(module)) for name, module in self.model.get_submodule(layer).named_modules()]
        for name in self.names:
            if wanted == [(n, type(m)) for n, m in self.run.model.get_submodule(name).named_modules()]:
                return name
        raise LillamaError("no block that was seen to run is like this one", where=layer)
