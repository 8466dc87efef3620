"""Snapshots of the concurrent schedule: all students, optimisers and best states, now and then."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from lillama.base import ranks, stop
from lillama.base.rundir import RunDirectory
from lillama.base.tensorfile import Entry, TensorFile
from lillama.distill.student import Student

NAME = "snapshot.safetensors"


class Snapshot:
    """Stores the state of `students` at most every `seconds` and when a run is stopped; restores it bit for bit."""

    def __init__(self, directory: RunDirectory, students: dict[int, Student], seconds: float) -> None:
        self.directory, self.students, self.seconds = directory, students, seconds
        self._last = time.monotonic()

    def maybe(self, step: int) -> None:
        """Store the state after `step` if the time has come, or the end.

        Of several processes, which have the same state, the first does by itself; not while numbers wait to be looked
        at, which all of them must do together.
        """
        if not ranks.is_first():
            return
        waiting = ranks.world() > 1 and any(student.log.waits for student in self.students.values())
        if stop.is_wanted() or (time.monotonic() - self._last >= self.seconds and not waiting):
            with ranks.alone():
                self.save(step)
            self._last = time.monotonic()

    def save(self, step: int) -> None:
        """Store the state after `step`. Numbers and tensors go into one file, so that they cannot disagree."""
        for student in self.students.values():
            student.look()  # a loss that waits to be looked at may be bad, and the state with it
        tensors: dict[str, Tensor] = {}
        entries: list[Entry] = []
        for position, student in self.students.items():
            for i, (name, parameter) in enumerate(student.trained.items()):
                tensors[f"{position}/now/{name}"] = parameter.data
                for key, value in student.optimizer.state.get(parameter, {}).items():
                    tensors[f"{position}/optimizer/{i}/{key}"] = value
            entries += [dataclasses.replace(e, name=f"{position}/best/{e.name}") for e in student.best.entries()]
            numbers = torch.tensor([student.best_loss, student.first_loss, student.best_together], dtype=torch.float64)
            # A loss that was not measured yet is no number.
            entries.append(dataclasses.replace(Entry.of(f"{position}/losses", numbers), anything=True))
            tensors[f"{position}/recoveries"] = torch.tensor(student.recoveries)
        tensors["step"] = torch.tensor(step)
        self.directory.put_entries(NAME, [*entries, *(Entry.of(*item) for item in tensors.items())])
        self.directory.event("snapshot", step=step)

    def restore(self) -> int:
        """Put the students back where the last snapshot left them; the number of steps done (0: none)."""
        if not self.directory.has(NAME):
            return 0
        file = TensorFile(self.directory.path / NAME)  # read tensor by tensor: whole, it is larger than the students
        step = int(file.read("step"))
        for position, student in self.students.items():
            optimizer: dict[int, dict[str, Any]] = {}
            best: dict[str, Tensor] = {}
            for key in file:
                owner, _, rest = key.partition("/")
                if owner != str(position):
                    continue
                kind, _, name = rest.partition("/")
                if kind == "now":
                    student.trained[name].data.copy_(file.read(key))
                elif kind == "best":
                    best[name] = file.read(key)
                elif kind == "optimizer":
                    index, _, field = name.partition("/")
                    optimizer.setdefault(int(index), {})[field] = file.read(key)
            if student.owner is None:
                groups = student.optimizer.state_dict()["param_groups"]
                student.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
            student.best.drop()
            if best:
                student.best.keep(best)
            losses = file.read(f"{position}/losses").tolist()
            student.best_loss, student.first_loss, student.best_together = losses
            student.steps = step
            recoveries = f"{position}/recoveries"  # which earlier versions did not store
            student.recoveries = int(file.read(recoveries)) if recoveries in file else 0
        self.directory.event("resumed", step=step)
        return step

    def remove(self) -> None:
        """Drop the snapshot once the layers themselves are stored."""
        self.directory.forget(NAME)
