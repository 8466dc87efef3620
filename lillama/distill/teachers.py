"""The original layers of the concurrent schedule, which wants them all at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from lillama.base import memory
from lillama.distill.job import Job


class Teachers:
    """Gives the original layers one at a time, on the device.

    They stay there between steps. With `run.low_memory` only the one in use is there: the others wait in the host's
    memory where the device is another, and on disk where it is not.
    """

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        """Read what is to stay in memory; it is released with `stack`."""
        self.job = job
        self.low = job.recipe.run.low_memory
        self.on_disk = self.low and job.device.device.type == "cpu"
        self.modules = [job.source.model.get_submodule(layer.name) for layer in job.layers]
        if not self.on_disk:
            place = "cpu" if self.low else job.device.device
            for layer in job.layers:
                job.source.materialise([layer.name], place)
                stack.callback(job.source.release, job.source.model.get_submodule(layer.name))

    @contextlib.contextmanager
    def at(self, position: int) -> Iterator[nn.Module]:
        """The layer at `position`, for as long as the block lasts."""
        module = self.modules[position]
        if self.on_disk:
            with self.job.walk.open_layer(self.job.layers[position]) as module:
                yield module
            memory.give_back()  # reading a layer leaves holes between what stays
        elif self.low:
            waiting = _move(module, self.job)
            try:
                yield module
            finally:
                for child, name, tensor in waiting:
                    parameter = child._parameters[name]
                    assert parameter is not None
                    parameter.data = tensor
        else:
            yield module


def _move(module: nn.Module, job: Job) -> list[tuple[nn.Module, str, Tensor]]:
    """Put the parameters of `module` on the device; where each was before."""
    waiting = []
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                waiting.append((child, name, parameter.data))
                parameter.data = parameter.data.to(job.device.device, non_blocking=True)
    return waiting
