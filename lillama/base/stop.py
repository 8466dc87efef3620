"""Being told to stop: Ctrl-C and SIGTERM end a run at the next point where its state is worth storing, and soon.

What is on disk is whole at any instant, so a process may be stopped anywhere. Loops that can do better than the last
stored state (a snapshot, a checkpoint of the trainer) run in `at_a_good_moment` and ask `is_wanted` after each step.
Wherever the signal finds the process, in a matrix product of a minute or waiting for a disk, it is gone after `LIMIT`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from lillama.base import ranks

SOON = 2.5  # seconds that a loop has to come to a good moment
LIMIT = 4.5  # seconds after which the process ends in the middle of whatever it does
CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
GO_ON = "the same command continues where it was"


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `signal` is its number."""

    def __init__(self, number: int) -> None:
        self.signal = number
        super().__init__(signal.Signals(number).name)


_wanted: int | None = None
_waiting = 0  # loops that come to a good moment by themselves


def message(number: int, advice: str = "") -> str:
    """What a person is told who stopped a command; `advice` says how to go on."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    gone = ranks.said_of_missing() if number == signal.SIGTERM else ""  # which is why the launcher ends the others
    if not (gone or ranks.is_first()):
        return ""
    why = f"{gone}: stopped ({name})" if gone else f"stopped ({name})"
    return ranks.named(f"lillama: {why}{f'; {advice}' if advice else ''}\n")


def is_wanted() -> bool:
    """Whether a signal has come: store what there is, then `now`."""
    return _wanted is not None


def now() -> None:
    """Raise Stopped if a signal has come.

    Of several processes the first stores, and ends; the others follow when they miss it.
    """
    if ranks.is_first():
        _raise_if_wanted()


def _raise_if_wanted() -> None:
    if _wanted is not None:
        raise Stopped(_wanted)


ranks.on_loss.append(_raise_if_wanted)


@contextlib.contextmanager
def at_a_good_moment() -> Iterator[None]:
    """While the block lasts a signal is only noted for SOON seconds: the block asks `is_wanted`, stores, and stops."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


@contextlib.contextmanager
def signals(advice: str = "") -> Iterator[None]:
    """Have signals stop what the block does (Stopped). In the main thread alone; elsewhere nothing changes.

    `advice` is what is said where the process has to be ended in the middle of what it does.
    """
    global _wanted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _wanted, done = None, threading.Event()
    before = {number: signal.signal(number, _handle) for number in CODES}
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    woken = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receiving, done, advice), name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(sending)  # which ends the watcher
        watcher.join()
        os.close(receiving)
        _wanted = None


def _handle(number: int, frame: FrameType | None) -> None:
    """Called between two instructions of the main thread."""
    global _wanted
    again, _wanted = _wanted is not None, number
    if again or not _waiting:
        raise Stopped(number)


def _watch(receiving: int, done: threading.Event, advice: str) -> None:
    """See signals at once, also while the main thread is inside a long call that lets other threads run."""
    while byte := os.read(receiving, 1):
        if byte[0] in CODES:
            break
    else:
        return
    number = signal.Signals(byte[0])
    if not done.wait(SOON):
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # no good moment came: now
    if not done.wait(LIMIT - SOON):
        sys.stderr.write(message(number, advice))
        sys.stderr.flush()
        os._exit(CODES[number])
