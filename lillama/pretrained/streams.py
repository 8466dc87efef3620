"""Where streams are kept while layers are worked on one by one: on the device, on the host, or in files.

A stream is kept whole in one place, the first that has room for as many streams as are in use at once. Files are read
and written a batch at a time. They are not mapped into memory: the pages of a map count as memory of the process, and
the system's file cache serves as well. Streams in files outlive the process, so that a resumed run starts at the last
layer boundary instead of replaying the layers before it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import psutil
import torch
from torch import Tensor

from lillama.base import ranks, shares, tensorfile
from lillama.base.device import free_memory, send
from lillama.base.files import read_checked, write_checked

Place = Literal["device", "host", "file"]
BOUNDARY = "boundary.json"
GIB = 1 << 30


Share = Literal["auto"] | float  # GiB; auto: a quarter of what is free


def budgets(device_gib: Share, host_gib: Share, device: torch.device) -> tuple[int, int]:
    """Bytes that streams may take on the device (0 where that is the host itself) and on the host."""
    if device.type != "cuda":
        device_bytes = 0
    elif device_gib == "auto":
        device_bytes = (free_memory(device) or 0) // 4
    else:
        device_bytes = int(device_gib * GIB)
    host_bytes = psutil.virtual_memory().available // 4 if host_gib == "auto" else int(host_gib * GIB)
    return device_bytes, host_bytes


def choose(total: int, device_bytes: int, host_bytes: int) -> Place:
    """The first place with room for `total` bytes."""
    return "device" if total <= device_bytes else "host" if total <= host_bytes else "file"


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in the host's memory: from a GPU in pages that stay where they are, so that copies need not wait.

    The copy is made in the order of the device's own work, and so is what waits for it (`Ahead`).
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Ahead:
    """Brings tensors from pinned memory to a card: the next one on a stream of copies, while the card works on one.

    The one that was taken last is kept: two streams that are still the same give the same tensor, not two copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._last: tuple[int, Tensor] | None = None
        self._next: tuple[int, Tensor] | None = None

    def take(self, tensors: Sequence[Tensor], index: int) -> Tensor:
        """The tensor `index` on the card, and the one behind it on its way there."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        work = torch.cuda.current_stream(self.device)
        if self._next is not None and self._next[0] == index:
            found = self._next[1]
            work.wait_stream(self._copies)
            found.record_stream(work)  # its memory is of the other stream, which must not take it back too early
        else:
            found = tensors[index].to(self.device, non_blocking=True)
        self._last, self._next = (index, found), None
        if index + 1 < len(tensors):
            self._copies.wait_stream(work)  # on which the host's numbers may still be arriving
            with torch.cuda.stream(self._copies):
                self._next = index + 1, tensors[index + 1].to(self.device, non_blocking=True)
        return found

    def forget(self) -> None:
        """Give the card's memory back."""
        self._last = self._next = None


class Stream:
    """One tensor per batch, in order; reading one brings it to the device."""

    def __init__(self, place: Place, device: torch.device, path: Path) -> None:
        self.place, self.device, self.path = place, device, path
        self._ahead = Ahead(device) if place == "host" and device.type == "cuda" else None
        self._tensors: list[Tensor] = []
        self._entries: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._end = self._sum = 0  # bytes of the file, and their CRC
        self._handle: BinaryIO | None = None

    def append(self, tensor: Tensor) -> None:
        """Take in the next batch's tensor."""
        tensor = tensor.detach()
        if self.place != "file":
            self._tensors.append(to_host(tensor) if self.place == "host" else tensor)
            return
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self.path.open("w+b", buffering=0)
        self._entries.append((self._end, tuple(tensor.shape), tensor.dtype))
        view = tensorfile.raw(tensor)
        self._handle.seek(self._end)
        self._end += len(view)
        self._sum = zlib.crc32(view, self._sum)
        while view:
            view = view[self._handle.write(view) :]

    def __len__(self) -> int:
        return len(self._entries if self.place == "file" else self._tensors)

    def __getitem__(self, index: int) -> Tensor:
        if self._ahead is not None:
            return self._ahead.take(self._tensors, index)
        if self.place != "file":
            return self._tensors[index].to(self.device)
        start, shape, dtype = self._entries[index]
        size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
        buffer = torch.empty(size, dtype=torch.uint8)
        if self._handle is None:
            self._handle = self.path.open("rb", buffering=0)
        self._handle.seek(start)
        tensorfile.read_into(self._handle, buffer, str(self.path))
        return send(buffer.view(dtype).view(shape), self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def flush(self) -> None:
        """Have a file on disk before anything says that it is."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())

    def drop(self) -> None:
        """Give the memory or the file back."""
        self._tensors, self._entries = [], []
        if self._ahead is not None:
            self._ahead.forget()
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        if self.place == "file":
            self.path.unlink(missing_ok=True)

    def describe(self) -> dict[str, object]:
        """What `restore` needs to know."""
        entries = [[start, list(shape), str(dtype).removeprefix("torch.")] for start, shape, dtype in self._entries]
        return {"file": self.path.name, "bytes": self._end, "crc": self._sum, "entries": entries}

    @classmethod
    def restore(cls, directory: Path, device: torch.device, said: dict[str, object]) -> Stream | None:
        """A stream left by an earlier process; None where its file is not what `describe` said."""
        path = directory / Path(str(said["file"])).name
        if not path.is_file() or path.stat().st_size != said["bytes"] or _crc(path) != said["crc"]:
            return None
        stream = cls("file", device, path)
        entries: list[tuple[int, list[int], str]] = said["entries"]  # type: ignore[assignment]
        stream._entries = [(start, tuple(shape), getattr(torch, dtype)) for start, shape, dtype in entries]
        stream._end, stream._sum = int(str(said["bytes"])), int(str(said["crc"]))
        return stream


def _crc(path: Path) -> int:
    """The CRC of a file's content."""
    found = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


class Shelf:
    """The streams of a run. `place` is decided once, by `choose`, before the first is made.

    Of several processes each has those of its own batches or rows, in files of its own.
    """

    def __init__(self, directory: Path, device: torch.device, place: Place) -> None:
        self.whole, self.directory = directory, shares.own_folder(directory)
        self.device, self.place = device, place

    def new(self, name: str) -> Stream:
        """An empty stream."""
        return Stream(self.place, self.device, self.directory / f"{name}.bin")

    def mark(self, position: int, streams: dict[str, Stream]) -> None:
        """Remember `streams` as those that enter layer `position`. Only files can be remembered."""
        if self.place != "file":
            return
        for stream in streams.values():
            stream.flush()
        said = {name: stream.describe() for name, stream in streams.items()}
        write_checked(self.directory / BOUNDARY, {"position": position, "streams": said})

    def marked(self) -> tuple[int, dict[str, Stream]] | None:
        """(position, streams) of the last mark; None where there is none, or its files are not whole."""
        try:
            said = read_checked(self.directory / BOUNDARY)
            found: dict[str, Stream | None] = {}
            by_file: dict[str, Stream | None] = {}
            for name, one in said["streams"].items():
                if one["file"] not in by_file:  # the two streams are one until the first planned layer
                    by_file[one["file"]] = Stream.restore(self.directory, self.device, one)
                found[name] = by_file[one["file"]]
            position = int(said["position"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = {name: stream for name, stream in found.items() if stream is not None}
        return (position, whole) if len(whole) == len(found) else None

    def clear_all(self) -> None:
        """Remove every file, those of other processes too, however many they were; all processes call it."""
        ranks.by_first(lambda: shutil.rmtree(self.whole, ignore_errors=True))

    def clear(self) -> None:
        """Remove every file."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)
