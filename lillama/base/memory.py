"""Keeping the resident memory of a long run at what is in use, and in memory what is needed again."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
LARGE = 4 << 20  # bytes
MOST = (1 << 31) - 1  # bytes: the largest number mallopt takes
KERNELS = 2048  # that oneDNN keeps


@functools.cache
def _libc() -> Any:
    """The C library where it is glibc, else None."""
    if sys.platform != "linux":
        return None
    import ctypes  # not where lillama is only imported

    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def return_large_blocks() -> None:
    """Have what is allocated in large blocks go back to the system as soon as it is freed.

    glibc raises its limit for that, up to 32 MiB, once a large block was freed; a layer's matrices then leave holes,
    and the memory of a run grows from layer to layer though nothing is kept.
    """
    if _libc() is not None:
        _libc().mallopt(_MMAP_THRESHOLD, LARGE)


def keep_large_blocks() -> None:
    """Have what was freed be used again, not go back to the system.

    glibc takes a block of more than 32 MiB fresh from the system every time, and the first touch of its pages costs
    several times what is then computed: log_softmax of 1024 x 49152 logits took 160 ms, and 55 ms in a block used
    before.
    """
    if _libc() is not None:
        _libc().mallopt(_MMAP_MAX, 0)
        _libc().mallopt(_TRIM_THRESHOLD, MOST)


def keep_kernels() -> None:
    """Have oneDNN keep as many of the kernels that it makes as a model of many shapes needs; before its first product.

    It makes one for every shape of a product in bfloat16 and keeps 1024, two a shape. A compressed model has a rank of
    its own in every weight, and every length of input has kernels of its own: where more are needed than are kept, each
    is made again for every product, which took half of the time of a forward pass (docs/results/speed.md). A kernel for
    AMX takes 0.7 MB, so not many more are kept. The user's own setting stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


@contextmanager
def settled() -> Iterator[None]:
    """Spare `give_back` what is there already, modules that were imported above all, for as long as the block lasts.

    To look through them for what only points at itself takes a fifth of a second, every time; of what is made in the
    block nothing is spared. Where somebody else has frozen objects it is left to them.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Free what only points at itself (modules and their optimisers), and return free memory to the system and card."""
    gc.collect()
    torch = sys.modules.get("torch")  # whoever has something on a card has imported it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if _libc() is not None:
        _libc().malloc_trim(0)


# The largest of what was forgotten: bytes of this process ("") and of every CUDA device, by its number.
_forgotten: dict[str, int] = {}


def remember_peaks() -> None:
    """Note the peaks so far: to be called before anything has the system or a device forget them."""
    _remember("", _resident_peak())
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            _remember(str(number), torch.cuda.max_memory_allocated(number))


def _remember(what: str, peak: int) -> int:
    _forgotten[what] = max(_forgotten.get(what, 0), peak)
    return _forgotten[what]


def memory_in_use() -> int:
    """Bytes that are in use now: on the first CUDA device in use, else the resident memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return _remember("", _resident_peak())


def peak_device_memory(device: torch.device) -> int:
    """The most memory this process allocated so far on a CUDA device, in bytes."""
    import torch

    number = torch.cuda.current_device() if device.index is None else device.index
    return _remember(str(number), torch.cuda.max_memory_allocated(device))


def _resident_peak() -> int:
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]  # Windows only
