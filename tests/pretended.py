"""A card that is not there: tensors that say they are on it, with their numbers in the host's memory.

Inside `Pretended("cuda:1")` what is sent or made there becomes a `Placed` tensor. Its numbers are real, so that what
depends on them (is it finite? which expert?) goes its way; and every operation is looked at as a card would:

- tensors of two devices in one operation are refused, but for single numbers and indices from the host;
- float64 on MPS is refused;
- `devices` are those on which anything was ever made: `cuda` without a number is the current one, as in CUDA;
- `waits` are the places at which the host waited for the card: it read a number, or copied without `non_blocking`;
- `by_hand` are the places at which the host itself multiplied matrices or decomposed them.

To C++ the tensors are the CPU's: autograd refuses a device whose backend is not there. So Python sees to their device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from pretended_operations import CARDS, CPU, Operations, Placed, bare, begin, place_of, pretence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Pretended(TorchFunctionMode):
    """The machine has `device`, and others of its kind beside it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.asked = torch.device(device)
        self.kind = self.asked.type
        self.current = 0
        self.devices: Counter[str] = Counter()
        self.strays: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.by_hand: Counter[str] = Counter()
        self.born: torch.device | None = None  # where what an operation makes for itself belongs
        self.pinned: set[int] = set()
        self.order: list[str] = []  # what streams of the card were asked for
        self._below = Operations(self)

    def __enter__(self) -> Pretended:
        begin(self)
        self._below.__enter__()
        return super().__enter__()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Look at calls once more, inside one that was looked at."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._below.__exit__(*raised)

    def resolve(self, device: Any) -> torch.device | None:
        """A device of this kind with its number; None where `device` names another kind."""
        if isinstance(device, int) and not isinstance(device, bool):
            return torch.device("cuda", device) if self.kind == "cuda" else None
        if not isinstance(device, str | torch.device):
            return None
        found = torch.device(device)
        if found.type != self.kind:
            return None
        if self.kind == "mps":
            return self.asked
        return torch.device(found.type, self.current if found.index is None else found.index)

    def wait(self, what: str) -> None:
        """The host waits for the card."""
        self.waits[f"{place_of(3)}: {what}"] += 1

    def place(self, tensor: Any, label: torch.device) -> Any:
        """`tensor` on a card."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, Placed) or tensor.is_meta:
            return tensor
        if label.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({place_of()})")
        self.devices[str(label)] += 1
        if label != self.asked:
            self.strays[f"{place_of()}: {label}"] += 1
        return Placed(tensor, label)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        engine = ENGINE.get(func)
        if engine is not None:  # Python functions run inside of it
            with self.again(), self._making(args[0]):
                return engine(*args, **kwargs)
        if name == "__set__" and func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        if name in ("to", "cuda", "cpu", "mps", "type_as") and args and isinstance(args[0], torch.Tensor):
            moved = self._move(name, args, kwargs)
            if moved is not NotImplemented:
                return moved
        wanted = kwargs.get("device")
        first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Placed)), None)
        if wanted is not None and isinstance(wanted, str | torch.device | int):
            label = self.resolve(wanted)
            if label is not None or first is not None:
                return self._made(func, args, kwargs, label)
        with self._making(first):
            return func(*args, **kwargs)

    @contextlib.contextmanager
    def _making(self, tensor: Any) -> Iterator[None]:
        """What is made meanwhile, by C++ and without a device's name, is where `tensor` is."""
        first = next((t for t in pytree.tree_leaves(tensor) if isinstance(t, Placed)), None)
        before, self.born = self.born, None if first is None else first.label
        try:
            yield
        finally:
            self.born = before

    def _made(self, func: Any, args: Any, kwargs: Any, label: torch.device | None) -> Any:
        """A tensor made on a device that was named (`label` None: none of ours)."""
        plain = {**kwargs, "device": "cpu" if label is not None else kwargs["device"]}
        pinned = plain.pop("pin_memory", False)
        generator = plain.get("generator")
        if label is not None and generator is not None and getattr(generator, "device", CPU) != label:
            raise RuntimeError(f"Expected a '{label}' device type for generator but found '{generator.device}'")
        with self._making(None), torch.no_grad():
            found = func(*pytree.tree_map(bare, args), **pytree.tree_map(bare, plain))
        if pinned:
            self.pinned.add(found.data_ptr())
        if label is None:
            return found
        wants = found.requires_grad
        return self.place(found.detach(), label).requires_grad_(wants)

    def _move(self, name: str, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        device, dtype, waits = kwargs.get("device"), kwargs.get("dtype"), not kwargs.get("non_blocking", False)
        if name == "cuda":
            device = rest[0] if rest else "cuda"
        elif name == "cpu":
            device = "cpu"
        for number, one in enumerate(rest if name == "to" else ()):
            if isinstance(one, torch.Tensor):
                device, dtype = one.device, one.dtype
            elif isinstance(one, str | torch.device) or (isinstance(one, int) and not isinstance(one, bool)):
                device = one
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, bool) and isinstance(
                rest[number - 1], str | torch.device | torch.dtype | torch.Tensor
            ):
                waits = not one
        if isinstance(kwargs.get("other"), torch.Tensor):
            device, dtype = kwargs["other"].device, kwargs["other"].dtype
        if device is None:
            return NotImplemented
        label, at = self.resolve(device), tensor.device
        if label is None and not isinstance(tensor, Placed):
            if isinstance(rest[0] if rest else None, Placed):
                return tensor.to(device, dtype)
            return NotImplemented
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if label == at and dtype in (None, tensor.dtype) and not kwargs.get("copy"):
            return tensor
        if label == at:
            return tensor.to(dtype, copy=kwargs.get("copy", False))
        target = label or torch.device(device)
        # The type changes where the numbers are, and where they go on Apple's: there is no float64 to send.
        if dtype is not None and dtype != tensor.dtype:
            tensor = tensor.to(dtype)
        if waits and tensor.numel() and target.type != "meta":
            self.wait(f"{at} to {target}")
        return _Move.apply(tensor, target)


class _Move(torch.autograd.Function):
    """A copy from one device to another, which has a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, target: torch.device) -> Any:
        ctx.back = tensor.device
        return _moved(tensor, target)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _moved(gradient, ctx.back), None


def _moved(tensor: torch.Tensor, target: torch.device) -> Any:
    held = tensor.held if isinstance(tensor, Placed) else tensor
    if target.type == "meta":
        return torch.empty_like(held, device="meta")
    copied = held.detach().clone()
    return pretence().place(copied, target) if target.type in CARDS else copied


def _backward(
    loss: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """torch.autograd.backward, and a tensor's own."""
    _run_back(loss, inputs or (), gradient, bool(retain_graph or create_graph), create_graph, True, True)


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, allow_unused: bool = False, **more: Any) -> Any:
    """torch.autograd.grad."""
    keep, create = bool(more.get("retain_graph")), bool(more.get("create_graph"))
    return _run_back(outputs, inputs, grad_outputs, keep or create, create, allow_unused, False)


def _run_back(outputs: Any, inputs: Any, given: Any, keep: bool, create: bool, unused: bool, accumulate: bool) -> Any:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    given = (given,) if isinstance(given, torch.Tensor) else given or [None] * len(outputs)
    given = tuple(torch.ones_like(one) if grad is None else grad for one, grad in zip(outputs, given))
    engine = torch.autograd.graph._engine_run_backward
    return engine(outputs, given, keep, create, inputs, unused, accumulate_grad=accumulate)


ENGINE = {torch.Tensor.backward: _backward, torch.autograd.backward: _backward, torch.autograd.grad: _gradients}


def _set_data(tensor: Any, value: Any) -> None:
    """`tensor.data = value`, also where one is on a card and the other is not."""
    if isinstance(tensor, Placed) and isinstance(value, Placed):
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
        tensor.held, tensor.label = value.held, value.label
    elif isinstance(tensor, Placed) or isinstance(value, Placed):
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(value, requires_grad=tensor.requires_grad))
    else:
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
