"""The machine around a pretended card: what torch says of its devices, its streams, generators and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pretended import Pretended
from pretended_operations import CPU, pretence


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
            patch.setattr(
                place, name, lambda *given, host=host: host(*[t for t in given if isinstance(t, torch.Tensor)])
            )
    grouped = torch._C._group_tensors_by_device_and_dtype

    def by_device(lists: Any, with_indices: bool = False) -> Any:
        """To C++ all are on the CPU."""
        found = grouped(lists, with_indices).items()
        return {(next(t for t in rows[0][0] if t is not None).device, key[1]): rows for key, rows in found}

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(
        torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode)
    )  # no subclass can have it
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a pretence is of one thread
    patch.setattr(torch, "Event", Happened)
    AcceleratorState._reset_state(True)  # accelerate remembers a process's device
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pretended:
            yield pretended
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        patch.undo()
        AcceleratorState._reset_state(True)
