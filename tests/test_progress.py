"""What a person who watches is told: how long is left, and what is in memory."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from lillama.base import progress as shown
from lillama.base.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes as fast as the test says."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_first_step_does_not_count_for_what_is_left(clock):
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=False)).phase("finetune", 31) as bar:
        clock[0] += 45  # what is made once
        bar.advance()
        assert bar.seconds_left(clock[0]) is None
        for _ in range(2):
            clock[0] += 16
            bar.advance(tokens=512, loss=0.25)
        assert bar.seconds_left(clock[0]) == pytest.approx(28 * 16)
    lines = out.getvalue().splitlines()
    assert "left" not in lines[0] and "7 min 44 s left" in lines[1], lines
    assert re.search(r"tokens/s · loss 0\.2500 · \d+\.\d GiB", lines[1])


def test_steps_of_an_earlier_run_took_no_time(clock):
    with Progress(None).phase("distil", 10) as bar:
        bar.skip(6)
        for _ in range(2):
            clock[0] += 3
            bar.advance()
        assert bar.seconds_left(clock[0]) == pytest.approx(2 * 3)


def test_plain_lines_are_ten_seconds_apart_at_least(clock):
    assert shown.EVERY_SECONDS >= 10
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=False)).phase("distil", 100) as bar:
        for _ in range(100):
            clock[0] += 0.5
            bar.advance()
    assert len(out.getvalue().splitlines()) <= 50 / 10 + 1


def test_a_phase_ends_with_the_steps_that_were_needed_and_one_without_says_nothing():
    said = io.StringIO()
    progress = Progress(Console(file=said, width=100))
    with progress.phase("embed", 64) as bar:
        bar.advance(48)
    with progress.phase("nothing", 64):
        pass
    assert said.getvalue().startswith("embed 48/48 · ") and "nothing" not in said.getvalue()
    assert "nothing" in progress.seconds
    with pytest.raises(KeyError), progress.phase("fails", 3):
        raise KeyError
    assert "fails" not in said.getvalue()
