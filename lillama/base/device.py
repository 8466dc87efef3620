"""Which device does the work, and in which type its matrix products run."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from lillama.errors import LillamaError
from lillama.recipe.schema import Run

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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose(run: Run) -> Device:
    """The device and compute type of a recipe; a device that is not there is an error."""
    # oneDNN keeps the code it made for the last 1024 shapes of matrix products, some 300 KB each; the tokens that reach
    # an expert are another number every time. It looks at this before its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LillamaError(
            f"the device '{name}' cannot be used: {reason}", where="run.device", hint="Use auto or cpu."
        ) from error
    if run.compute == "auto":
        return Device(device, torch.bfloat16 if fast_bfloat16(device) else torch.float32)
    return Device(device, torch.bfloat16 if run.compute == "bfloat16" else torch.float32)


def factorising(device: torch.device) -> torch.device:
    """Where matrices that live on `device` are factorised: that takes float64, which Apple's MPS does not have."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def machine() -> str:
    """What the machine calls its processor, and how many cores may be used."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(named, platform.processor() or platform.machine())}, {cores} core{'' if cores == 1 else 's'}"


def name(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
