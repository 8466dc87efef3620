"""GGUF files, gone through once by what goes through them three times: a configuration, the weights, a tokenizer.

transformers opens the file anew for each of them, and lists the names of an architecture's weights anew for every
module of the model. Each is the same every time, and takes seconds of Python: half of what unpacking SmolLM2-135M
takes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READER, NAMES = "GGUFReader", "get_tensor_name_map"  # what transformers asks of the package gguf


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Let what is read and listed inside the block be what was found before, as long as the file is the same."""
    try:
        import gguf
    except ImportError:  # transformers says so, in its own words
        yield
        return
    own = {name: getattr(gguf, name) for name in (READER, NAMES)}
    for name, one in zip(own, _kept(own[READER], own[NAMES])):
        setattr(gguf, name, one)
    try:
        yield
    finally:
        for name, one in own.items():
            setattr(gguf, name, one)


def forget() -> None:
    """Let go of what was read last, a hundred thousand views into the file."""
    _kept.cache_clear()


@functools.lru_cache(maxsize=1)
def _kept(reader: Any, names: Any) -> tuple[Any, Any]:
    """`reader` and `names`, as the package has them, which keep what they found last."""

    @functools.lru_cache(maxsize=1)
    def read(path: str, _written: int, _size: int, mode: str) -> Any:
        return reader(path, mode)

    def opened(path: os.PathLike[str] | str, mode: str = "r") -> Any:
        about = Path(path).stat()
        return read(os.fspath(path), about.st_mtime_ns, about.st_size, mode)

    return opened, functools.lru_cache(maxsize=1)(names)
