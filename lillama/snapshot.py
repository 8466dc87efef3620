"""Snapshots of the concurrent schedule: all students, optimisers and best states, now and then."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from lillama.store import RunDirectory
from lillama.student import Student

NAME = "snapshot.safetensors"


class Snapshot:
    """Stores the state of `students` at most every `seconds`, and restores it bit for bit."""

    def __init__(self, directory: RunDirectory, students: dict[int, Student], seconds: float) -> None:
        self.directory, self.students, self.seconds = directory, students, seconds
        self._last = time.monotonic()

    def maybe(self, step: int) -> None:
        """Store the state after `step` if the time has come."""
        if time.monotonic() - self._last >= self.seconds:
            self.save(step)
            self._last = time.monotonic()

    def save(self, step: int) -> None:
        """Store the state after `step`. Numbers and tensors go into one file, so that they cannot disagree."""
        tensors: dict[str, Tensor] = {}
        for position, student in self.students.items():
            for i, (name, parameter) in enumerate(student.trained.items()):
                tensors[f"{position}/now/{name}"] = parameter.data
                for key, value in student.optimizer.state.get(parameter, {}).items():
                    tensors[f"{position}/optimizer/{i}/{key}"] = value
            for name, value in (student.best or {}).items():
                tensors[f"{position}/best/{name}"] = value
            numbers = torch.tensor([student.best_loss, student.first_loss], dtype=torch.float64)
            tensors[f"{position}/losses"] = numbers
        tensors["step"] = torch.tensor(step)
        self.directory.put_tensors(NAME, tensors)
        self.directory.event("snapshot", step=step)

    def restore(self, device: torch.device) -> int:
        """Put the students back where the last snapshot left them; the number of steps done (0: none)."""
        if not self.directory.has(NAME):
            return 0
        tensors = self.directory.tensors(NAME)
        step = int(tensors["step"])
        for position, student in self.students.items():
            optimizer: dict[int, dict[str, Any]] = {}
            best = {}
            for key, value in tensors.items():
                owner, _, rest = key.partition("/")
                if owner != str(position):
                    continue
                kind, _, name = rest.partition("/")
                if kind == "now":
                    student.trained[name].data.copy_(value)
                elif kind == "best":
                    best[name] = value.clone()
                elif kind == "optimizer":
                    index, _, field = name.partition("/")
                    optimizer.setdefault(int(index), {})[field] = value
            groups = student.optimizer.state_dict()["param_groups"]
            student.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
            student.best = best or None
            student.best_loss, student.first_loss = tensors[f"{position}/losses"].tolist()
            student.steps = step
        self.directory.event("resumed", step=step)
        return step

    def remove(self) -> None:
        """Drop the snapshot once the layers themselves are stored."""
        self.directory.forget(NAME)
