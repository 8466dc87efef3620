"""A card that is not there: tensors that say they are on it, with their numbers in the host's memory.

Inside `Pretended("cuda:1")` what is sent or made there becomes a `Placed` tensor. Its numbers are real, so that whatever
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
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
PROJECT = str(Path(__file__).parent.parent)
CARDS = ("cuda", "mps")

READS = {aten._local_scalar_dense.default, aten.equal.default}
# What makes tensors whose size depends on numbers: a card is waited for to learn it.
SIZED_BY_NUMBERS = ("nonzero", "masked_select", "unique", "_unique2", "unique_dim", "repeat_interleave", "bincount")
# Decompositions say whether they worked, which is looked at at once, on the host.
CHECKED = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq")
ACROSS = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
HEAVY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "linalg_", "_linalg_", "geqrf")


class Placed(torch.Tensor):
    """A tensor on a card that is not there; `held` has its numbers."""

    held: torch.Tensor
    label: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, label: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held, made.label = held, label
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor of a pretended card, outside the pretence")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.label

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.label.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placed({tuple(self.shape)}, {self.dtype}, {self.label})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def record_stream(self, queue: Queue) -> None:
        queue.pretended.order.append(f"kept for {queue.name}")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.label} device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        pretence().wait("tolist")
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self))
        if copied is None:
            copied = Placed(self.held.clone(), self.label).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return copied


def bare(value: Any) -> Any:
    """The numbers of a tensor, wherever it is."""
    return value.held if isinstance(value, Placed) else value


class Generator(torch.Generator):
    """A generator of random numbers that says it is of a card."""

    label: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.label = pretence().resolve(device) or CPU
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.label


_here = threading.local()


def pretence() -> Pretended:
    """The pretence that goes on."""
    return _here.pretence


def place_of(depth: int = 2) -> str:
    """The innermost line of the project that led here, as `file:line function`."""
    frame = sys._getframe(depth)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT) and name != __file__:
            return f"{Path(name).relative_to(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


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
        self._below = _Operations(self)

    def __enter__(self) -> Pretended:
        _here.pretence = self
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
            elif isinstance(one, bool) and isinstance(rest[number - 1], str | torch.device | torch.dtype | torch.Tensor):
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


class _Operations(TorchDispatchMode):
    """Looks at every operation, those of the way back too."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pretended = self.pretended
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        placed = [t for t in tensors if isinstance(t, Placed)]
        name = func.overloadpacket.__name__
        if not placed:
            if name.startswith(HEAVY) and any(t.is_floating_point() and not t.is_meta for t in tensors):
                pretended.by_hand[f"{place_of()}: {name}"] += 1
            found = func(*args, **kwargs)
            if pretended.born is not None and not tensors and kwargs.get("device") in (None, CPU):
                return pytree.tree_map(lambda t: pretended.place(t, pretended.born), found)
            return found
        label = self._common(func, tensors, placed)
        if func is aten._to_copy.default and kwargs.get("device") is not None:  # as C++ sees it
            label = pretended.resolve(kwargs["device"]) or label
        self._look(func, name, args, kwargs, placed)
        plain = pytree.tree_map(bare, kwargs)
        given = pytree.tree_map(bare, args)
        if func is aten.histc.default and not given[0].is_floating_point():  # which a card counts, and the host does not
            found = func(given[0].float(), *given[1:], **plain).to(given[0].dtype)
        else:
            found = func(*given, **plain)
        return self._returned(func, args, kwargs, found, label)

    def _common(self, func: Any, tensors: list[Any], placed: list[Any]) -> torch.device:
        """The device of an operation, which is that of all its tensors."""
        if func in ACROSS:
            return tensors[0].device
        few = [t for t in tensors if t.dim() or isinstance(t, Placed)]  # a single number of the host goes anywhere
        if func in INDEXED:
            few = [t for t in few if isinstance(t, Placed) or t.dtype not in (torch.int64, torch.bool)]
        where = {str(t.device) for t in few}
        if len(where) > 1:
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {' and '.join(sorted(where))} "
                f"in {func} ({shapes}) at {place_of(3)}"
            )
        return placed[0].label

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, placed: list[Any]) -> None:
        pretended = self.pretended
        if any(t.label.type == "mps" and t.dtype == torch.float64 for t in placed):
            raise TypeError(f"the MPS framework doesn't support float64 ({place_of(3)})")
        by_mask = func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if func in READS or by_mask or name in SIZED_BY_NUMBERS or name.startswith(CHECKED):
            pretended.wait(name)
        if func is aten.copy_.default and args[0].device != args[1].device:
            # From a card into memory that may be moved: the host waits, whatever was asked for.
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not free or (args[0].device == CPU and args[0].data_ptr() not in pretended.pinned):
                pretended.wait(f"{args[1].device} to {args[0].device}")

    def _returned(self, func: Any, args: Any, kwargs: Any, found: Any, label: torch.device) -> Any:
        """What an operation returns, on its device; a tensor that it wrote into is that tensor itself."""
        written = [
            value
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[argument.name]
            for argument in func._schema.arguments
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write
        ]
        same = {id(t.held if isinstance(t, Placed) else t): t for t in pytree.tree_leaves(written) if t is not None}

        def back(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return same[id(value)] if id(value) in same else self.pretended.place(value, label)

        return pytree.tree_map(back, found)


class Queue:
    """A stream of a card: work in order, beside that of others. `pretended.order` says what was asked of which."""

    def __init__(self, pretended: Pretended, name: str) -> None:
        self.pretended, self.name = pretended, name

    def wait_stream(self, other: Queue) -> None:
        self.pretended.order.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.pretended.order.append(f"on {self.name}")
        yield


class Happened:
    """A moment in the work of a card, which can be waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pretence().wait("event")


@contextlib.contextmanager
def machine(device: str, fast_bfloat16: bool = False) -> Iterator[Pretended]:
    """A machine with two cards (or Apple's one), of which `device` is asked for; everything torch says of it fits."""
    pretended = Pretended(device)
    patch = pytest.MonkeyPatch()

    def set_device(which: Any) -> None:
        pretended.current = torch.device(which).index or 0

    cuda = pretended.kind == "cuda"
    answers: dict[str, Any] = {
        "is_available": lambda: cuda,
        "is_initialized": lambda: cuda,
        "get_device_capability": lambda which=None: (9, 0),
        "device_count": lambda: 2 if cuda else 0,
        "current_device": lambda: pretended.current,
        "set_device": set_device,
        "mem_get_info": lambda which=None: (1 << 30, 1 << 31),
        "synchronize": lambda which=None: pretended.wait("synchronize"),
        "is_bf16_supported": lambda including_emulation=True: fast_bfloat16,
        "get_device_name": lambda which=None: "a card that is not there",
        **{name: lambda which=None: 0 for name in ("max_memory_allocated", "memory_allocated")},
        **{name: lambda which=None: None for name in ("empty_cache", "reset_peak_memory_stats")},
    }
    work = Queue(pretended, "work")
    answers |= {"Stream": lambda which=None: Queue(pretended, "copies"), "current_stream": lambda which=None: work}
    answers["stream"] = lambda queue: queue.at_work()
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch.backends.mps, "is_available", lambda: not cuda)
    patch.setattr(torch.backends.mps, "is_built", lambda: not cuda)
    patch.setattr(torch.mps, "synchronize", lambda: pretended.wait("synchronize"))
    for name in ("empty_cache", "manual_seed"):
        patch.setattr(torch.mps, name, lambda *_: None)
    start, enabled, asked = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def named(kind: str) -> str:
        return "cpu" if kind == pretended.kind else kind

    patch.setattr(torch.autocast, "__init__", lambda self, kind, *more, **how: start(self, named(kind), *more, **how))
    patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled(named(kind)))
    patch.setattr(torch, "get_autocast_dtype", lambda kind: asked(named(kind)))

    states = {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    for name, host in states.items():
        for place in (torch.cuda, torch.cuda.random):
            patch.setattr(place, name, lambda *given, host=host: host(*[t for t in given if isinstance(t, torch.Tensor)]))
    grouped = torch._C._group_tensors_by_device_and_dtype

    def by_device(lists: Any, with_indices: bool = False) -> Any:
        """To C++ all are on the CPU."""
        found = grouped(lists, with_indices).items()
        return {(next(t for t in rows[0][0] if t is not None).device, key[1]): rows for key, rows in found}

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))  # no subclass can have it
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a pretence is of one thread
    patch.setattr(torch, "Event", Happened)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pretended:
            yield pretended
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        patch.undo()
