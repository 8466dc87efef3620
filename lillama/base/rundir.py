"""The run directory: files appear whole or not at all, and a run continues where it stopped.

Every file is written beside itself, flushed to disk and renamed; the manifest (manifest.py) names those that are
finished. A directory of files that belong together (a checkpoint) is a unit: it is finished as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from lillama.base import disk, manifest, ranks
from lillama.base.files import (
    end_last_line,
    flush,
    sha256,
    sync_directory,
    without_infinities,
    write_entries,
    write_json,
    write_tensors,
)
from lillama.base.manifest import Manifest
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from torch import Tensor

    from lillama.base.tensorfile import Entry

MODEL = "model"  # the checkpoint
FINETUNED = "finetuned"  # the checkpoint after fine-tuning
QUANTIZED = "quantized"  # the last checkpoint in few bits
ORIGINAL = "original"  # the original unpacked, where it came in another form
CHECKPOINTS = (MODEL, FINETUNED, QUANTIZED)  # in their order: the last that is there is a run's result
UNITS = (*CHECKPOINTS, ORIGINAL)
RESOLVED = "recipe.resolved.yaml"
EVENTS = "events.jsonl"
LOCK = ".lock"
OWNER = ".owner"  # who has the lock, for people
CALIBRATION = "calibration"  # the text that a model wrote itself: it is there before a run begins, and has its own hash
OWN_TEXT = f"{CALIBRATION}/own.jsonl"
LEARNED_TEXT = f"{CALIBRATION}/learned.jsonl"  # what the model wrote for training alone
BOOKKEEPING = frozenset((LOCK, OWNER, CALIBRATION, manifest.NAME, manifest.COPY))
# What a process that was killed leaves: files and folders not yet renamed, best states of layers that were learning.
LEFTOVERS = (".*.part", "*/.*.part", "best.[0-9]*.safetensors", "best.[0-9]*.initial")

FISHER = "sensitivity"  # the folder of what sensitivity.py finds
# In progress until the checkpoint is there: finished files, and folders of what is not.
WORK = ("init/", f"{FISHER}/", "snapshot.safetensors")
WORK_FOLDERS = ("streams", f"{FISHER}/streams")


def last_checkpoint(path: Path) -> Path | None:
    """The last checkpoint that is in the run directory `path`; None where there is none."""
    there = [path / name for name in CHECKPOINTS if (path / name / "config.json").is_file()]
    return there[-1] if there else None


P = ParamSpec("P")
T = TypeVar("T")


def _by_first(method: Callable[Concatenate[RunDirectory, P], T]) -> Callable[Concatenate[RunDirectory, P], T]:
    """Have the first of a run's processes do it; all wait, and know of the same files afterwards."""

    @functools.wraps(method)
    def shared(self: RunDirectory, *given: P.args, **options: P.kwargs) -> T:
        found, self._manifest.files = ranks.by_first(lambda: (method(self, *given, **options), self._manifest.files))
        return found

    return shared  # type: ignore[return-value]  # mypy does not see a method in it


class RunDirectory:
    """Everything a run leaves, and the memory that lets the same command continue it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = Manifest()
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []  # of events
        self.remarks: list[str] = []  # what `open` has to say, for people
        self._lock = FileLock(path / LOCK, timeout=0)

    def held(self) -> dict[str, Any] | None:
        """The fingerprint of the run that is here; None where there is none, or none that can be read."""
        try:
            return manifest.read(self.path).fingerprint
        except LillamaError:
            return None

    @_by_first
    def open(self, fingerprint: dict[str, Any], restart: bool = False) -> None:
        """Start a run here, or continue the one whose fingerprint is the same; `restart` discards the one that is here.

        The directory is this process' own until `close`. Raises LillamaError, writing nothing, when the directory holds
        another run (the differences are named) or files that are not a run's, and when another process works here.
        """
        with disk.explained(self.path):
            restart = self._claim(fingerprint, restart)
            try:
                if restart:
                    self._discard()
                else:
                    self._check(fingerprint)  # again: another process may have begun a run meanwhile
                self._remove_leftovers()
                end_last_line(self.path / EVENTS)
                if restart or not manifest.is_there(self.path):
                    self._manifest = Manifest(fingerprint)
                    self._write()
                else:
                    self._drop_damaged()
            except BaseException:
                self.close()
                raise

    @contextlib.contextmanager
    def claimed(self, fingerprint: dict[str, Any], restart: bool = False) -> Iterator[None]:
        """While the block lasts the directory is this process' own, before a run is begun in it or goes on.

        For what takes long and decides the `fingerprint` of `open`; errors are those of `open`.
        """
        with disk.explained(self.path):
            self._claim(fingerprint, restart)
        try:
            yield
        finally:
            self._lock.release()

    @_by_first
    def by_first(self, work: Callable[[], object]) -> None:
        """Have the first process do `work`, in which it may put files and directories; the others know of them then."""
        work()

    def close(self) -> None:
        """Let other processes work here."""
        self._lock.release(force=True)

    def _claim(self, fingerprint: dict[str, Any], restart: bool) -> bool:
        """Take the lock of a directory that may be used; whether what it holds is to go."""
        restart = restart and self.path.exists() and not self._is_empty()
        if restart:
            manifest.read(self.path)  # refuses what is no run's
        else:
            self._check(fingerprint)
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        return restart

    def _acquire(self) -> None:
        """Take the lock, and leave a word on who has it. It is the system's: a process that dies gives it back."""
        try:
            self._lock.acquire()
        except Timeout as error:
            said = ""
            with contextlib.suppress(OSError):
                said = (self.path / OWNER).read_text(encoding="utf-8").strip()
            who = f" (it is {said})" if said else ""
            raise LillamaError(
                f"another process works in this run directory{who}",
                where=str(self.path),
                hint="Wait until it is done, stop it, or give another run.out.",
            ) from error
        (self.path / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def _check(self, fingerprint: dict[str, Any]) -> None:
        """LillamaError unless a run with this fingerprint may go on, or begin, here; reads the manifest there is."""
        if manifest.is_there(self.path):
            self._manifest = manifest.read(self.path)
            if differences := manifest.differences(self._manifest.fingerprint, fingerprint):
                raise LillamaError(
                    "the directory holds another run, which differs in\n    " + "\n    ".join(differences),
                    where=str(self.path),
                    hint="Give another run.out, or --restart to discard the run that is there.",
                )
            return
        if self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise LillamaError(
                "this is not an empty directory, and not a run's",
                where=str(self.path),
                hint="Give another run.out.",
            )

    def _is_empty(self) -> bool:
        """Whether nothing but an old lock is here, and text that a model wrote."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {""}
        if all(path.name.startswith(("own.", ".own.")) for path in (self.path / CALIBRATION).glob("*")):
            names -= {CALIBRATION}
        # A process that was killed as it began may have left the first lines of a manifest.
        begun = {name for name in names if name.endswith(".part") and name.startswith(f".{manifest.NAME}.")}
        return names - begun <= {LOCK, OWNER}

    def _discard(self) -> None:
        """Remove what the manifest lists of the run that is here; what else there is stays, and is remarked on."""
        held = manifest.read(self.path)
        for name in held.files:
            self._remove(name)
        for name in held.also:
            self._remove(name, whole=True)
        self._remove_leftovers()
        left = sorted(path.name + "/" * path.is_dir() for path in self.path.iterdir() if path.name not in BOOKKEEPING)
        if left:
            self.remarks.append(f"not of the earlier run, and left as it is in {self.path}: {', '.join(left)}")

    def _remove(self, name: str, whole: bool = False) -> None:
        """Remove a file of the run, and the directories that it leaves empty; with `whole` a directory with all in it.

        Never what a link leads to, nor anything that is not below this directory.
        """
        path = self.path / name
        if not path.parent.resolve().is_relative_to(self.path.resolve()):
            return
        if whole and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_file() or path.is_symlink():
            path.unlink()
        for parent in path.relative_to(self.path).parents[:-1]:
            with contextlib.suppress(OSError):  # others have files there
                (self.path / parent).rmdir()

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed had not finished. The lock is held, so nobody else is at it."""
        for pattern in LEFTOVERS:
            for path in self.path.glob(pattern):
                self._remove(str(path.relative_to(self.path)), whole=True)

    def _drop_damaged(self) -> None:
        """Forget what is not as it was written. A checkpoint is one unit: with one file of it, all of it goes."""
        files = self._manifest.files
        damaged = {
            name
            for name, digest in files.items()
            if not (self.path / name).is_file() or sha256(self.path / name) != digest
        }
        units = tuple(f"{unit}/" for unit in UNITS if any(name.startswith(f"{unit}/") for name in damaged))
        gone = {name for name in files if name in damaged or name.startswith(units)}
        if gone:
            there = [name for name in sorted(damaged) if (self.path / name).exists()]
            if there:
                self.remarks.append(f"damaged, and made again: {', '.join(there)}")
            self.forget(*gone)

    def _write(self) -> None:
        self._manifest.write(self.path)

    @contextlib.contextmanager
    def put_directory(self, name: str, seal: Callable[[Path], dict[str, str]] | None = None) -> Iterator[Path]:
        """A directory to fill, which becomes the unit `name` with all its files recorded when the block ends.

        `seal` may leave a word of its own in it, and gives the hashes of files that it has read.

        The manifest names them just before the directory gets its name: a process that is killed in between leaves
        names of files that are not there, which the next one forgets.
        """
        self._clear(name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=self.path))
        try:
            yield temporary
            known = seal(temporary) if seal else {}
            flush(temporary)
            temporary.chmod(0o755)
            files = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
            self._manifest.files |= {f"{name}/{one}": known.get(one) or sha256(files[one]) for one in sorted(files)}
            self._write()
            temporary.rename(self.path / name)
            sync_directory(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _clear(self, name: str) -> None:
        """Make way for the unit `name`: remove what is known of it, set aside what nobody knows."""
        self.forget(*(file for file in self._manifest.files if file.startswith(f"{name}/")))
        path = self.path / name
        if path.exists() or path.is_symlink():
            count = 1
            while (aside := path.with_name(f"{name}.unknown-{count}")).exists():
                count += 1
            path.rename(aside)
            self.event("set_aside", what=name, to=aside.name)

    def has(self, name: str) -> bool:
        """Whether the file was finished and is unharmed."""
        return name in self._manifest.files

    def digests(self, unit: str) -> dict[str, str]:
        """sha256 of the finished files of a unit (a checkpoint, say), by name."""
        return {name: digest for name, digest in self._manifest.files.items() if name.startswith(f"{unit}/")}

    @_by_first
    def record(self, *names: str) -> None:
        """Take finished files into the manifest."""
        for name in names:
            self._manifest.files[name] = sha256(self.path / name)
        self._write()

    @_by_first
    def forget(self, *names: str) -> None:
        """Remove files and take them out of the manifest.

        In this order: a process that is killed in between leaves names of files that are not there, which the next one
        forgets. The other way round it would leave files that nobody knows.
        """
        for name in names:
            self._manifest.files.pop(name, None)
            self._remove(name)
        if names:
            self._write()

    @_by_first
    def drop_work(self) -> None:
        """Remove what was in progress: the checkpoint is there."""
        self.forget(*(name for name in self._manifest.files if name.startswith(WORK)))
        for folder in WORK_FOLDERS:
            self._remove(folder, whole=True)

    @_by_first
    def put_json(self, name: str, data: Any) -> None:
        """Write and record a JSON file."""
        write_json(self.path / name, data)
        self.record(name)

    @_by_first
    def put_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write and record a safetensors file."""
        write_tensors(self.path / name, tensors, metadata)
        self.record(name)

    @_by_first
    def put_files(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any] | None = None) -> None:
        """Write several safetensors and JSON files and record them at once: who is killed leaves all or none."""
        for name, one in (data or {}).items():
            write_json(self.path / name, one)
        for name, held in tensors.items():
            write_tensors(self.path / name, held)
        self.record(*(data or {}), *tensors)

    @_by_first
    def put_entries(self, name: str, entries: list[Entry]) -> None:
        """Write and record a safetensors file of tensors that are read when their turn comes."""
        write_entries(self.path / name, entries)
        self.record(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a recorded safetensors file, into memory of its own."""
        from lillama.base.tensorfile import TensorFile

        file = TensorFile(self.path / name)
        return {key: file.read(key) for key in file}

    def json(self, name: str) -> Any:
        """Read a recorded JSON file."""
        return json.loads((self.path / name).read_text())

    def event(self, kind: str, **data: Any) -> None:
        """Append one line to events.jsonl: what happened, when, with which numbers."""
        if not ranks.is_first():
            return
        with (self.path / EVENTS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(without_infinities({"time": round(time.time(), 3), "event": kind, **data})) + "\n")
        for listen in list(self.listeners):
            listen(kind, data)
