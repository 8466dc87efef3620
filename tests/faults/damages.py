"""Damages files of run directories, and looks whether the same command notices.

    python tests/faults/damages.py 300

Every kind of file that a run has, finished or killed half-way, is flipped in one bit, cut short, emptied or deleted.
The same command must then end with the weights of the undamaged run, or refuse in one message with exit status 2.
Another model that is accepted, or a traceback, is a trouble.
"""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import children
import families
import storm

HARMS = ("flip", "truncate", "empty", "delete")
# Where runs are stopped, to be damaged half-way: the phase, and for what share of its time it had lasted.
STOPS = {
    "sequential": (("distil", 0.6), ("evaluate after", 0.5), ("finetune", 0.95), ("evaluate finetuned", 0.5)),
    "concurrent": (("sensitivity", 0.7), ("initialise", 0.7), ("distil", 0.9), ("finetune", 0.95)),
}


@dataclass
class Found:
    """What was damaged, and what came of it."""

    refused: int = 0
    same: int = 0
    harms: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    troubles: list[str] = field(default_factory=list)


def harm(path: Path, how: str, draw: random.Random) -> None:
    """Damage one file."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "truncate":
        content = content[: draw.randrange(max(len(content), 1))]
    elif how == "empty":
        content = bytearray()
    path.write_bytes(content)


def kind_of(name: str) -> str:
    """The kind of a file by its name in the run directory: numbers tell files of one kind apart."""
    return re.sub(r"\d+", "#", re.sub(r"(layers|init|sensitivity|streams)/.*(\.\w+)", r"\1/*\2", name))


def states(case: storm.Case, work: Path, stops: int) -> list[Path]:
    """Copies of the case's run directory, finished and stopped half-way, at the first `stops` of the STOPS."""
    found = [work / "finished"]
    shutil.copytree(case.out, found[0])
    for phase, share in STOPS[case.name.rpartition("-")[2]][:stops]:
        for _ in range(3):
            shutil.rmtree(case.out)
            if storm.kill_in(case, phase, share) is not None:
                found.append(work / phase.replace(" ", "-"))
                shutil.copytree(case.out, found[-1])
                break
    return found


def trial(case: storm.Case, state: Path, name: str, how: str, draw: random.Random, found: Found) -> None:
    """Damage the file `name` of a run in `state`, and give the same command."""
    shutil.rmtree(case.out, ignore_errors=True)
    shutil.copytree(state, case.out)
    harm(case.out / name, how, draw)
    log = case.recipe.parent / "damaged.txt"
    code = children.run(case.recipe, log).wait()
    text = log.read_text()
    found.harms[how] += 1
    found.kinds[kind_of(name)] += 1
    what = f"{case.name}, {state.name}, {how} {name}"
    if code == 0:
        left = children.results(case.out)
        wrong = [] if left == case.expected else [f"other weights: {left}"]
        wrong += [one for one in storm.whole(case.out) if "left behind" not in one]
        if wrong:
            found.troubles.append(f"{what}: {'; '.join(wrong)}")
        else:
            found.same += 1
    elif code == 2 and "Traceback" not in text and "lillama: " in text:
        found.refused += 1
    else:
        found.troubles.append(f"{what}: ended with {code}: {text[-700:]}")


def damages(home: Path, count: int, cases: list[tuple[str, str]], seed: int = 0, stops: int = 9) -> Found:
    """`count` damages, spread over the cases, the states of their runs, and the kinds of files in them."""
    draw, found = random.Random(seed), Found()
    plan = []
    for case_name in cases:
        case = storm.prepare(home, *case_name)
        for state in states(case, home / case.name, stops):
            by_kind: dict[str, list[str]] = {}
            for path in sorted(state.rglob("*")):
                if path.is_file():
                    name = path.relative_to(state).as_posix()
                    by_kind.setdefault(kind_of(name), []).append(name)
            plan += [(case, state, names, how) for names in by_kind.values() for how in HARMS]
    draw.shuffle(plan)
    for number in range(count):
        case, state, names, how = plan[number % len(plan)]
        trial(case, state, draw.choice(names), how, draw, found)
    return found


def main() -> int:
    parser = families.arguments(__doc__, "count", 300, ("llama", "mixtral", "whisper"))
    parser.add_argument("--stops", type=int, default=9, help="at how many instants runs are stopped half-way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lillama-damages-") as home:
        os.environ["LILLAMA_CACHE"] = f"{home}/cache"
        start = time.monotonic()
        found = damages(Path(home), args.count, families.cases(args), args.seed, args.stops)
    sys.stdout.write(
        f"{found.harms.total()} damages to {len(found.kinds)} kinds of files: {found.same} ended with the weights of "
        f"the undamaged run, {found.refused} were refused in one message, {len(found.troubles)} troubles "
        f"({time.monotonic() - start:.0f} s)\n"
    )
    for trouble in found.troubles:
        sys.stdout.write(f"{trouble}\n")
    return 1 if found.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
