"""Which device does the work, and in which type its matrix products run."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lillama.base import ranks
from lillama.errors import LillamaError

FILLED = 0.85  # share of a card's free memory that weights may take; what is computed from them wants the rest

WITHOUT_FLOAT64 = ("mps",)


@dataclass(frozen=True)
class Device:
    """A torch device and the type of its matrix products (`compute`)."""

    device: torch.device
    compute: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in `compute`; everything else as the tensors are."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def working(self, dtype: torch.dtype) -> torch.dtype:
        """The type teacher weights of type `dtype` are held in while distilling."""
        return dtype if dtype == self.compute else torch.float32

    def activate(self) -> None:
        """Make it the current device: what names no device (`cuda` alone, a library's own choice) means this one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose(device: str = "auto", compute: str = "auto") -> Device:
    """The device and compute type that a recipe's `run` names; a device that is not there is an error."""
    # oneDNN keeps the code it made for the last 1024 shapes of matrix products, some 300 KB each; the tokens that reach
    # an expert are another number every time. It looks at this before its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and ranks.local() is not None:  # one of several processes: each has a card
        name = f"cuda:{ranks.local()}"
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LillamaError(
            f"the device '{name}' cannot be used: {reason}", where="run.device", hint="Use auto or cpu."
        ) from error
    fast = fast_bfloat16(found) if compute == "auto" else compute == "bfloat16"
    return Device(found, torch.bfloat16 if fast else torch.float32)


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A CUDA device is not waited for: what is sent was read when this returns.

    It lies in memory that may move, which CUDA copies before it goes on; pinned memory must be left alone meanwhile.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.device.type == "cpu")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a card; None where the device has no memory of its own to ask about.

    Blocks that torch keeps for later are given back first: the driver counts them as taken.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def cards_like(device: torch.device) -> list[torch.device]:
    """The cards that may be used where `device` was asked for: all of them for `cuda`, for `cuda:1` that one alone."""
    if device.index is not None:
        return [device]
    return [torch.device(device.type, index) for index in range(torch.cuda.device_count())]


def fits(weights: int, device: torch.device) -> bool:
    """Whether a model of so many bytes of weights can run on `device` as a whole."""
    free = free_memory(device)
    return free is None or weights <= FILLED * free


def factorising(device: torch.device) -> torch.device:
    """Where matrices that live on `device` are factorised: that takes float64, which Apple's MPS does not have."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def of_processor(key: str) -> str:
    """What Linux knows of the processor under a key, such as `model name` or `vendor_id`; else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def machine() -> str:
    """What the machine calls its processor, and how many cores may be used."""
    named = of_processor("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{named}, {cores} core{'' if cores == 1 else 's'}"


def name(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
