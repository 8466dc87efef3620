"""Safetensors files read and written a tensor at a time.

Plain reads and writes, not a memory map: the pages of a map count as resident memory of the process for as long as
one tensor of the file is in use, and a model larger than memory must not be there by the back door.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lillama.base.finite import how_many, is_finite
from lillama.errors import LillamaError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER = 100_000_000  # bytes; the format allows no more
BLOCK = 1 << 24  # bytes read or written at a time where no tensor is made of them

_Place = tuple[torch.dtype, tuple[int, ...], int, tuple[int, int]]  # type, shape, first byte, extent in the data


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header says of it, and how to get it when its turn comes.

    `anything`: its numbers need not be finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    anything: bool = False

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * torch.empty((), dtype=self.dtype).element_size()

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """A tensor that is at hand."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Lazy:
    """A tensor of a file that is read when it is indexed with `[...]`, as transformers' loader does."""

    def __init__(self, file: TensorFile, key: str) -> None:
        self.file, self.key = file, key

    def __getitem__(self, index: object) -> Tensor:
        tensor = self.file.read(self.key)
        return tensor if index is Ellipsis else tensor[index]  # type: ignore[index]


class TensorFile:
    """The header of a safetensors file, and its tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Read the header; LillamaError where it is none."""
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > min(size - 8, HEADER):
                    raise ValueError(f"its header would be {length:,} bytes long, of a file of {size:,}")
                header = json.loads(handle.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            self._entries = _entries(header, 8 + length, size)
        except (struct.error, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise LillamaError(
                f"this is no safetensors file, or a damaged one: {reason}",
                where=str(path),
                hint="Download or write it again.",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._entries[key][1]

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor, from the header."""
        return self._entries[key][0]

    def read(self, key: str) -> Tensor:
        """The tensor itself, in memory of its own. LillamaError where the file ends too soon."""
        dtype, shape, start, (first, last) = self._entries[key]
        buffer = torch.empty(last - first, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(start)
            read_into(handle, buffer, str(self.path))
        return buffer.view(dtype).view(shape)

    def entry(self, key: str, dtype: torch.dtype | None = None, name: str | None = None) -> Entry:
        """The tensor as one to be written elsewhere; floating-point ones in `dtype`."""
        here = self.dtype(key)
        target = dtype if dtype is not None and here.is_floating_point else here
        return Entry(name or key, self.shape(key), target, functools.partial(self._cast, key, target))

    def _cast(self, key: str, dtype: torch.dtype) -> Tensor:
        return self.read(key).to(dtype)

    def warm(self, keys: Iterable[str]) -> None:
        """Have the system bring tensors into its file cache; they take no memory of this process."""
        block = memoryview(bytearray(BLOCK))
        with self.path.open("rb", buffering=0) as handle:
            for key in keys:
                _, _, start, (first, last) = self._entries[key]
                handle.seek(start)
                left = last - first
                while left > 0 and (count := handle.readinto(block[: min(BLOCK, left)])):
                    left -= count


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, _Place]:
    """The tensors of a header whose data begin at `start`; ValueError unless they fill the file in turn."""
    found: dict[str, _Place] = {}
    for name, entry in header.items():
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in DTYPES:
            raise ValueError(f"'{name}' is of the unknown type {kind!r}")
        numbers = [*shape, first, last]
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"the shape or place of '{name}' is none: {numbers}")
        width = torch.empty((), dtype=DTYPES[kind]).element_size()
        if last - first != math.prod(shape) * width or math.prod(n for n in shape if n) >= 1 << 63:
            raise ValueError(f"'{name}' of shape {shape}, type {kind} has {last - first:,} bytes")
        found[name] = (DTYPES[kind], tuple(shape), start + first, (first, last))
    place = 0
    for name, (_, _, _, (first, last)) in sorted(found.items(), key=lambda item: item[1][3]):
        if first != place:
            raise ValueError(f"'{name}' begins at byte {first:,} of the data, where {place:,} is next")
        place = last
    if start + place != size:
        raise ValueError(f"its tensors end at byte {start + place:,}, the file at {size:,}")
    return found


def read_into(handle: BinaryIO, buffer: Tensor, where: str) -> None:
    """Fill a flat uint8 tensor from where `handle` stands."""
    view, done = buffer.numpy().data, 0
    while done < len(view):
        count = handle.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not count:
            raise LillamaError("the file ends in the middle of a tensor", where=where, hint="Download it again.")
        done += count


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, those of one on a device brought over."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write(path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; one tensor is in memory at a time.

    Raises LillamaError for a tensor that is not finite, unless its entry says that it may hold anything.
    """
    # The largest types first, as the format wants them aligned; names make the order definite.
    ordered = sorted(entries, key=lambda e: (-torch.empty((), dtype=e.dtype).element_size(), e.name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for entry in ordered:
        offsets = [place, place + entry.bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            tensor = entry.read()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise LillamaError(
                    f"the tensor became {tuple(tensor.shape)} {tensor.dtype}, not {entry.shape} {entry.dtype}",
                    where=entry.name,
                )
            if not entry.anything and not is_finite(tensor):
                file = path.name.lstrip(".").partition(".safetensors")[0]  # it is written under another name first
                raise LillamaError(
                    f"{how_many(tensor)} not finite in {str(entry.dtype).removeprefix('torch.')}: it is not stored",
                    where=f"{file}.safetensors: {entry.name}",
                    hint="Try model.dtype: bfloat16 or float32, whose numbers reach further than float16's.",
                )
            handle.write(raw(tensor))
