"""Small versions of the harnesses that `make storm` runs whole, and what signals do to a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import full_disk
import pytest

HERE = Path(__file__).parent


def harness(name: str, *arguments: str) -> str:
    """Run a harness in a process of its own, for it forks; its last line of figures."""
    done = subprocess.run([sys.executable, HERE / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_weights():
    said = harness("storm.py", "4", "--families", "llama")
    kills, trials, same, of = map(int, re.findall(r"\d+", said)[:4])
    assert kills >= 4 and trials == same == of


@pytest.mark.slow
def test_a_damaged_run_directory_gives_the_same_weights_or_a_message():
    said = harness("damages.py", "6", "--families", "llama", "--schedules", "sequential", "--stops", "1")
    assert said.startswith("6 damages") and " 0 troubles" in said


@pytest.mark.skipif(full_disk.compiler() is None, reason="there is no C compiler, which the full disk is made with")
@pytest.mark.slow
def test_a_disk_that_fills_leaves_what_was_finished_and_a_message():
    assert ": 0 troubles" in harness("full_disk.py", "120", "--every", "60")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_ends_a_run_within_five_seconds_and_says_how_to_go_on(number, code, tmp_path):
    recipe = families.prepare(tmp_path, "llama", "concurrent")
    command = [sys.executable, "-m", "lillama.cli.main", "run", str(recipe)]
    environment = {**os.environ, "LILLAMA_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    events, limit = tmp_path / "run" / "events.jsonl", time.monotonic() + 120
    while not (events.exists() and '"snapshot"' in events.read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode == code
    assert "the same command continues where it was" in said and "Traceback" not in said
