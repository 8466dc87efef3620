"""Progress a person can read: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, SupportsFloat

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

from lillama.base import memory

EVERY_SECONDS = 15.0
SHOWN_EVERY = 0.25  # seconds, on a terminal


class Bar:
    """One phase in progress. `rich` and `task` are set on a terminal."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.done = self.counted = self.tokens = 0
        self.what, self.loss, self.unit = "", None, "tokens/s"
        self._shown = ""
        self.started = self._spoke = time.monotonic()
        self._first: tuple[int, float] | None = None  # steps done and the time when the first of them were
        self.rich: RichProgress | None = None
        self.task: Any = None

    what: str
    loss: SupportsFloat | None

    def describe(self, what: str) -> None:
        """Say what is being worked on, such as a layer's name."""
        self.what = what
        self._shown = self._details()
        self._show()

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run did."""
        self.done += steps
        self._show(steps)

    def advance(self, steps: int = 1, *, tokens: int = 0, loss: SupportsFloat | None = None) -> None:
        """Count steps done now."""
        self.done += steps
        self.counted += steps
        if self._first is None and steps:
            self._first = self.counted, time.monotonic()
        self.tokens += tokens
        self.loss = loss if loss is not None else self.loss
        self._show(steps)

    def _line(self, last: str) -> str:
        """One line for where there is no bar."""
        return " · ".join(part for part in (f"{self.name} {self.done}/{self.total}", self._details(), last) if part)

    def _details(self) -> str:
        parts = [self.what] if self.what else []
        seconds = time.monotonic() - self.started
        if self.tokens and seconds > 0:
            parts.append(f"{self.tokens / seconds:,.0f} {self.unit}")
        if self.loss is not None:
            parts.append(f"loss {float(self.loss):.4f}")
        parts.append(f"{memory.memory_in_use() / 2**30:.1f} GiB")
        return " · ".join(parts)

    def _show(self, steps: int = 0) -> None:
        now = time.monotonic()
        if self.rich is not None:
            # A loss may be on a device, which has to be waited for to read it: as often as a person looks.
            if now - self._spoke >= SHOWN_EVERY or self.done >= self.total:
                self._spoke, self._shown = now, self._details()
            self.rich.update(self.task, advance=steps, details=self._shown)
            return
        if self.progress.console is not None and now - self._spoke >= EVERY_SECONDS:
            self._spoke = now
            left = self.seconds_left(now)
            self.progress.say(self._line("" if left is None else f"{clock(left)} left"))

    def seconds_left(self, now: float) -> float | None:
        """How long the rest takes at the pace so far; None before the second step.

        The first step does not count: it also waits for what is made once, and is often several times as long.
        """
        if self._first is None or self.counted <= self._first[0]:
            return None
        steps, since = self._first
        return (now - since) / (self.counted - steps) * (self.total - self.done)

    def finish(self) -> None:
        """End: what was done is all that there was to do, and where nothing was there is nothing to show."""
        self.total = min(self.total, self.done)
        if self.rich is not None:
            self.rich.update(self.task, total=self.total, visible=self.done > 0)
        elif self.progress.console is not None and self.done:
            self.progress.say(self._line(f"took {clock(time.monotonic() - self.started)}"))


class Progress:
    """Where progress goes: a console, or nowhere (`None`)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of phases inside the one being timed

    def say(self, text: str) -> None:
        """One line for the person watching."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time the block takes to the phase `name`, less that of phases timed within it."""
        start, outer, self._within = time.monotonic(), self._within, 0.0
        try:
            yield
        finally:
            took = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
            self._within = outer + took

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Bar]:
        """A phase of `total` steps, timed and shown."""
        bar = Bar(self, name, total)
        with self.timed(name):
            if self.console is not None and self.console.is_terminal:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[details]}"),
                )
                with RichProgress(*columns, console=self.console) as bar.rich:
                    bar.task = bar.rich.add_task(name, total=total, details="")
                    yield bar
                    bar.finish()
            else:
                yield bar
                bar.finish()


def clock(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
