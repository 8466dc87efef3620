"""Kills one of the processes of a run at many instants: the others stop, and the same command finishes the run.

    python tests/faults/kill_processes.py 10 --families llama --schedules sequential concurrent [--divide]

For each family and schedule a run of two processes is made without a break. Then runs of the same recipe lose one
process, by SIGKILL, at instants spread over its time; the others must be gone within 30 seconds, with a word on which
one was lost, and the same command must finish with the same weights. With --divide each process has a part of the model
while it learns as a whole.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import families
import psutil

LIMIT = 30.0  # seconds in which the others have to stop
ROOT = Path(__file__).parent.parent.parent


def environment() -> dict[str, str]:
    """Of processes that find this project, have a thread each and no network."""
    paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(recipe: Path, out: Path, count: int) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node COUNT -m lillama run RECIPE`, without a network."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    log = out.with_suffix(".log").open("a")
    command = [*launcher, "-m", "lillama", "run", str(recipe), "--set", f"run.out={out}"]
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment(), cwd=out.parent)


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the run, in the order in which they were started."""
    try:
        return sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.pid)
    except psutil.Error:
        return []


def begun(out: Path) -> float | None:
    """When the run wrote its first event of this start; None where it has not."""
    events = out / "events.jsonl"
    return events.stat().st_mtime if events.is_file() else None


def weights(out: Path) -> dict[str, str]:
    """sha256 of every checkpoint's weights below a run directory."""
    found = sorted(out.glob("*/model.safetensors"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def finish(recipe: Path, out: Path, count: int) -> float:
    """Run to the end; seconds from the first event to the last. Raises RuntimeError where it fails."""
    launcher, first = launch(recipe, out, count), None
    while launcher.poll() is None:
        first = first or (time.monotonic() if begun(out) else None)
        time.sleep(0.02)
    if launcher.returncode:
        raise RuntimeError(f"the run ended with {launcher.returncode}: {out.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - (first or time.monotonic())


def kill(recipe: Path, out: Path, count: int, victim: int, after: float) -> tuple[float, str]:
    """Kill process `victim` so many seconds after the first event; (seconds until all were gone, what was said).

    Raises RuntimeError where the run was over before.
    """
    launcher = launch(recipe, out, count)
    before = begun(out)
    while begun(out) == before and launcher.poll() is None:
        time.sleep(0.02)
    time.sleep(after)
    processes = workers(launcher)
    if launcher.poll() is not None or len(processes) < count:
        launcher.wait()
        raise RuntimeError("the run was over")
    processes[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=LIMIT)
    for process in alive:
        process.kill()
    took = time.monotonic() - start if not alive else float("inf")
    launcher.wait()
    return took, out.with_suffix(".log").read_text()


def storm(home: Path, family: str, schedule: str, kills: int, divide: bool = False) -> list[str]:
    """What went wrong in so many killed runs."""
    recipe = families.prepare(home, family, schedule, divide=str(divide).lower())
    whole = finish(recipe, home / "whole", 2)
    expected, troubles = weights(home / "whole"), []
    for number in range(kills):
        out, victim = home / f"killed-{number}", number % 2
        after = whole * number / kills
        try:
            took, said = kill(recipe, out, 2, victim, after)
        except RuntimeError as error:
            sys.stdout.write(f"  {after:5.1f} s: {error}\n")
            continue
        if took > LIMIT:
            troubles.append(f"{family} {schedule}: killed at {after:.1f} s, the other process did not stop")
        if f"process {victim} of 2" not in said:
            troubles.append(f"{family} {schedule}: killed at {after:.1f} s, nobody named process {victim}")
        finish(recipe, out, 2)
        same = weights(out) == expected
        sys.stdout.write(f"  {after:5.1f} s: process {victim}; the other gone in {took:.1f} s; same weights: {same}\n")
        sys.stdout.flush()
        if not same:
            troubles.append(f"{family} {schedule}: killed at {after:.1f} s, and ended with other weights")
    return troubles


def main() -> int:
    """The command line."""
    parser = families.arguments(__doc__, "kills", 10, ("llama",))
    parser.add_argument("--divide", action="store_true")
    args = parser.parse_args()
    troubles: list[str] = []
    with tempfile.TemporaryDirectory() as home:
        for family, schedule in families.cases(args):
            sys.stdout.write(f"{family} {schedule}\n")
            troubles += storm(Path(home) / f"{family}-{schedule}", family, schedule, args.kills, args.divide)
    for trouble in troubles:
        sys.stdout.write(f"{trouble}\n")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
