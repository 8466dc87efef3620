"""Keeping the resident memory of a long run at what is in use."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from typing import Any

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
LARGE = 4 << 20  # bytes


@functools.cache
def _libc() -> Any:
    """The C library where it is glibc, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def return_large_blocks() -> None:
    """Have what is allocated in large blocks go back to the system as soon as it is freed.

    glibc raises its limit for that, up to 32 MiB, once a large block was freed; a layer's matrices then leave holes,
    and the memory of a run grows from layer to layer though nothing is kept.
    """
    if _libc() is not None:
        _libc().mallopt(_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Free what only points at itself (modules and their optimisers), and return free memory to the system."""
    gc.collect()
    if _libc() is not None:
        _libc().malloc_trim(0)
