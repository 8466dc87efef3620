"""The best state of a student so far: in the host's memory, or in a file where that is short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lillama.base import tensorfile


class Best:
    """Keeps one state of some parameters, by name."""

    def __init__(self, file: Path | None = None) -> None:
        """`file`: where to keep it; None: in memory."""
        self.file = file
        self.kept: dict[str, Tensor] = {}
        self.drop()  # a file is of a process that was stopped

    def __bool__(self) -> bool:
        """Whether there is a state yet."""
        return bool(self.kept) or (self.file is not None and self.file.exists())

    @torch.no_grad()
    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` in place of the one before."""
        if self.file is not None:
            tensorfile.write(self.file, [tensorfile.Entry.of(name, value) for name, value in state.items()])
            return
        if not self.kept:
            self.kept = {name: torch.empty_like(value, device="cpu") for name, value in state.items()}
        for name, value in state.items():
            self.kept[name].copy_(value)

    def entries(self) -> list[tensorfile.Entry]:
        """The state as tensors to be written elsewhere."""
        if self.file is not None and self.file.exists():
            file = tensorfile.TensorFile(self.file)
            return [file.entry(name) for name in file]
        return [tensorfile.Entry.of(name, value) for name, value in self.kept.items()]

    @torch.no_grad()
    def put_back(self, state: Mapping[str, Tensor]) -> None:
        """Copy the state into the tensors of `state`."""
        for entry in self.entries():
            state[entry.name].copy_(entry.read())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy the state into the tensors of `state`, and drop it."""
        self.put_back(state)
        self.drop()

    def drop(self) -> None:
        """Forget the state."""
        self.kept = {}
        if self.file is not None:
            self.file.unlink(missing_ok=True)
