"""What a disk refuses, said in one line: no room, no right, a directory that is gone."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from lillama.errors import LillamaError

# Libraries that write files themselves raise errors of their own, which say so in these words.
FULL = ("no space left", "os error 28", "disk quota", "pytorchstreamwriter", "inline_container", "iostream error")


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn what a disk refuses below `place` while the block lasts into a LillamaError."""
    try:
        yield
    except LillamaError:
        raise
    except Exception as error:
        found = trouble(error, place)
        if found is None:
            raise
        raise found from error


def trouble(error: BaseException, place: Path) -> LillamaError | None:
    """What `error`, or one that led to it, says of the disk; None where it is about something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError | socket.gaierror):
            return None  # of a network, which the system reports in the same way
        if isinstance(seen, OSError) and seen.errno is not None:
            return _said(seen, place)
        text = str(seen).lower()
        if any(word in text for word in FULL):
            return _said(OSError(errno.ENOSPC, "No space left on device"), place)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _said(error: OSError, place: Path) -> LillamaError:
    hints = {
        errno.ENOSPC: "Make room; the same command continues where it was.",
        errno.EDQUOT: "Make room; the same command continues where it was.",
        errno.EACCES: "Get the right to write there, or give another directory.",
        errno.EPERM: "Get the right to write there, or give another directory.",
        errno.EROFS: "Give a directory on a disk that can be written.",
        errno.ENOENT: "It was there before: something else removed it. The same command begins again.",
    }
    where = str(error.filename or place)
    hint = hints.get(error.errno or 0, "The same command continues where it was.")
    return LillamaError(f"the disk refuses: {error.strerror or error}", where=where, hint=hint)
