"""Kills runs at random instants of every phase, and looks whether the same command ends with the same weights.

    python tests/faults/storm.py 200
    python tests/faults/storm.py 40 --signal TERM      # asked to end, which takes five seconds at most

Runs of tiny models of every family, in both schedules, with training and fine-tuning. Each is run to its end once;
then again and again it is killed (SIGKILL) in a phase chosen in turn, at a random instant of it, sometimes twice, and
the same command is given until it finishes. The weights of both checkpoints must have the sha256 of the uninterrupted
run, every file that of the manifest, and nothing of the kill may be left.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import children
import families

from lillama.base import manifest
from lillama.base.files import sha256

SHORT = 0.002  # seconds: a phase that takes less is not waited for
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
TRIES = 6  # how often the same command is given after a kill


@dataclass
class Case:
    """A recipe whose uninterrupted run is known: what it left, and the seconds of its phases."""

    name: str
    recipe: Path
    expected: dict[str, str]
    phases: dict[str, float]

    @property
    def out(self) -> Path:
        return self.recipe.parent / "run"


@dataclass
class Found:
    """What the storm did and saw."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by phase
    same: int = 0
    trials: int = 0
    troubles: list[str] = field(default_factory=list)


def prepare(home: Path, family: str, schedule: str, **changes: object) -> Case:
    """Run a case to its end; `changes` are of its recipe (families.py)."""
    name = f"{family}-{schedule}"
    recipe = families.prepare(home / name, family, schedule, **changes)
    phases = children.durations(children.run(recipe, home / name / "log.txt"))
    case = Case(name, recipe, children.results(home / name / "run"), phases)
    if len(case.expected) != 4:
        raise RuntimeError(f"{name}: the uninterrupted run left {case.expected}")
    return case


def kill_in(case: Case, phase: str, share: float, number: int = signal.SIGKILL) -> str | None:
    """Start the case and kill it when it has been in `phase` for `share` of that one's time; None: it finished.

    Raises RuntimeError where a signal that asks is not obeyed in time, with its own exit status.
    """
    child = children.run(case.recipe, case.recipe.parent / "killed.txt")
    wait, spent, before = share * case.phases.get(phase, 0.0), 0.0, time.monotonic()
    while child.poll() is None:
        now = time.monotonic()
        if child.phase == phase:
            spent += now - before
            if spent >= wait:
                where, sent = child.phase, time.monotonic()
                child.kill(number)
                code, took = child.wait(), time.monotonic() - sent
                if code == 0:
                    return None  # it had just finished
                if code != CODES.get(number, -number) or took > 5:
                    raise RuntimeError(f"{case.name}, {where}: ended with {code} after {took:.1f} s")
                return where
        before = now
        time.sleep(0.0002)
    return None


def whole(out: Path) -> list[str]:
    """What is wrong with a finished run directory."""
    held = manifest.read(out)
    wrong = [f"{name} is not as recorded" for name, digest in held.files.items() if sha256(out / name) != digest]
    known = {*held.files, *held.also, ".lock", ".owner", manifest.NAME, manifest.COPY}
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return wrong + [f"{name} was left behind" for name in sorted(there - known)]


def trial(case: Case, phase: str, draw: random.Random, found: Found, number: int) -> None:
    """Kill a fresh run of the case, and let the same command finish it."""
    shutil.rmtree(case.out, ignore_errors=True)
    where = kill_in(case, phase, draw.random(), number)
    if where is None:
        return  # the machine was faster this time
    found.trials += 1
    found.kills[where] += 1
    if draw.random() < 0.25 and (again := kill_in(case, draw.choice([*case.phases]), draw.random(), number)):
        found.kills[again] += 1
    log = case.recipe.parent / "again.txt"
    for _ in range(TRIES):
        code = children.run(case.recipe, log).wait()
        if code == 0:
            break
    troubles = whole(case.out) if code == 0 else [f"the same command ended with {code}: {log.read_text()[-600:]}"]
    if code == 0 and (left := children.results(case.out)) != case.expected:
        troubles.append(f"other weights: {left}")
    if troubles:
        found.troubles.append(f"{case.name}, killed in {phase}: {'; '.join(troubles)}")
    else:
        found.same += 1


def storm(home: Path, kills: int, cases: list[tuple[str, str]], seed: int = 0, number: int = signal.SIGKILL) -> Found:
    """At least `kills` kills, spread over the cases and their phases."""
    draw, found = random.Random(seed), Found()
    ready = [prepare(home, *case) for case in cases]
    turns = [(case, phase) for case in ready for phase, seconds in case.phases.items() if seconds >= SHORT]
    while found.kills.total() < kills:
        draw.shuffle(turns)
        for case, phase in turns:
            if found.kills.total() >= kills:
                break
            trial(case, phase, draw, found, number)
            if found.trials % 20 == 0:
                sys.stderr.write(f"{found.kills.total()} kills, {found.same} of {found.trials} the same\n")
    return found


def main() -> int:
    parser = families.arguments(__doc__, "kills", 200)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lillama-storm-") as home:
        os.environ["LILLAMA_CACHE"] = f"{home}/cache"
        start = time.monotonic()
        found = storm(Path(home), args.kills, families.cases(args), args.seed, signal.Signals[f"SIG{args.signal}"])
    sys.stdout.write(
        f"{found.kills.total()} kills in {found.trials} runs: {found.same} of {found.trials} ended with the weights of "
        f"the uninterrupted run ({time.monotonic() - start:.0f} s)\n"
    )
    for phase, count in found.kills.most_common():
        sys.stdout.write(f"  {count:4}  {phase}\n")
    for trouble in found.troubles:
        sys.stdout.write(f"{trouble}\n")
    return 1 if found.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
