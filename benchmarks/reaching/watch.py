"""Whether blocks were driven as the model drives them: what they put out during a run, against the model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reaching import build

CLOSE = 1e-4  # of the largest number of a block's output


class Streams:
    """The outputs of a model's blocks for one batch, and the nearest that a run was seen to compute."""

    def __init__(self, model: nn.Module, names: Sequence[str], batch: build.Inputs) -> None:
        """Run `model` on `batch`; `names` are its blocks."""
        self.expected: dict[str, Tensor] = {}
        self.nearest: dict[str, float] = {}
        with self._hooked(model, names, self._expect):
            build.run(model, batch)

    def _expect(self, name: str, output: Tensor) -> None:
        self.expected.setdefault(name, output.detach().clone())

    def _see(self, name: str, output: Tensor) -> None:
        expected = self.expected[name]
        if output.shape == expected.shape and not output.is_meta:
            apart = float((output.detach().float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            self.nearest[name] = min(apart, self.nearest.get(name, float("inf")))

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Watch the blocks of `model`, and copies of them that are made meanwhile."""
        with self._hooked(model, list(self.expected), self._see):
            yield

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module, names: Sequence[str], take: Any) -> Iterator[None]:
        modules = dict(model.named_modules())
        with contextlib.ExitStack() as stack:
            for name in names:
                if name in modules:
                    handle = modules[name].register_forward_hook(_Hook(name, take))
                    stack.callback(handle.remove)
            yield

    def verdict(self) -> str:
        """`yes`, or the first block whose own output no call came near."""
        for name in self.expected:
            apart = self.nearest.get(name)
            if apart is None:
                return f"{name} was not run on the whole of a batch"
            if apart > CLOSE:
                return f"{name} differs by {apart:.1e}"
        return "yes"


class _Hook:
    """A forward hook that hands on the hidden states a block puts out."""

    def __init__(self, name: str, take: Any) -> None:
        self.name, self.take = name, take

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        first = (
            output
            if isinstance(output, Tensor)
            else next(iter(output.values() if isinstance(output, dict) else output))
        )
        if isinstance(first, Tensor):
            with torch.no_grad():
                self.take(self.name, first)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self  # a student's copy of a layer tells the same
