"""Runs in processes of their own, forked so that they start at once, which say what they are at and can be killed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import mmap
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import families  # noqa: F401  # finds tests/conftest.py, which sets the number of threads before torch is imported

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it complains of forks

# So that children need not import them.
import datasets  # noqa: F401
import jinja2  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
import tqdm.std
import transformers

import lillama.finetune.train as finetune_train
import lillama.run.pipeline as pipeline
from lillama import host
from lillama.base.progress import Progress
from lillama.base.rundir import RunDirectory
from lillama.cli import main as cli
from lillama.distill.job import Job
from lillama.factorise.start import Initialiser
from lillama.report import html

for _name in ("cli.show", "data.audio", "evaluate.perplexity", "evaluate.sample", "evaluate.speech"):
    importlib.import_module(f"lillama.{_name}")
torch.set_num_threads(1)
host.get()
_ = transformers.Seq2SeqTrainer, transformers.AutoProcessor, transformers.AutoModelForCausalLM
NOTHING = "-"


class Child:
    """A forked process; `phase` is what it is at, by the names that `marked` gives."""

    def __init__(self, work: Callable[[], int], log: Path) -> None:
        self._said = mmap.mmap(-1, 64)
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1), os.dup2(handle, 2)
                _own_lock_of_bars()
                _own_pool_of_threads()
                _mark_phases(self._said)
                code = work()
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os.sys.stdout.flush(), os.sys.stderr.flush()
                os._exit(code)

    @property
    def phase(self) -> str:
        """What the process is at now."""
        return self._said[:64].split(b"\0")[0].decode() or NOTHING

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run(recipe: Path, log: Path, *more: str) -> Child:
    """`lillama run RECIPE` in a child."""
    return Child(lambda: cli.main(["run", str(recipe), *more]), log)


def _own_lock_of_bars() -> None:
    """Give this process a lock of its own for tqdm's bars: forks share theirs, and whoever is killed keeps it.

    Two commands that a user gives are two processes that share nothing; forks of one process must not either.
    """
    lock, classes = threading.RLock(), [tqdm.std.tqdm]
    while classes:
        found = classes.pop()
        found.set_lock(lock)
        classes += found.__subclasses__()


def _own_pool_of_threads() -> None:
    """Make torch's pool of threads anew while this process has one thread.

    A fork's first call to it does that, and where two threads come first at once (transformers reads a checkpoint with
    several) the second finds none: "Invalid thread pool!", and a checkpoint that seems damaged.
    """
    torch.set_num_threads(1)


def _mark_phases(said: mmap.mmap) -> None:
    """Have this process write the name of the phase that it is in, the innermost, into shared memory."""
    stack: list[str] = []

    def show() -> None:
        name = (stack[-1] if stack else "").encode()[:63]
        said[:64] = name.ljust(64, b"\0")

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        stack.append(name)
        show()
        try:
            yield
        finally:
            stack.pop()
            show()

    def marked(owner: object, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def wrapper(*arguments: object, **options: object) -> object:
            with within(name):
                return function(*arguments, **options)

        setattr(owner, attribute, wrapper)

    timed = Progress.timed

    @contextlib.contextmanager
    def timed_and_said(self: Progress, name: str) -> Iterator[None]:
        with within(name), timed(self, name):
            yield

    Progress.timed = timed_and_said
    marked(Job, "store", "store")
    marked(Initialiser, "__call__", "factorise")
    marked(finetune_train, "save", "write fine-tuned")
    marked(html, "write", "report")
    marked(RunDirectory, "open", "open")
    marked(pipeline.Run, "finish", "finish")


def results(out: Path) -> dict[str, str]:
    """sha256 of the weights that a finished run left, and of its plan."""
    folders = ("model", "finetuned", "quantized")
    files = [path for path in sorted(out.glob("*/*.safetensors")) if path.parent.name in folders]
    files += out.glob("plan.json")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def durations(child: Child) -> dict[str, float]:
    """Let a child run to its end; how many seconds it spent in each phase. Raises where it fails."""
    spent: dict[str, float] = {}
    before = time.monotonic()
    while (code := child.poll()) is None:
        time.sleep(0.0005)
        now = time.monotonic()
        spent[child.phase] = spent.get(child.phase, 0.0) + now - before
        before = now
    if code != 0:
        raise RuntimeError(f"the uninterrupted run ended with {code}")
    return spent
