"""A copy of a module of any size, filled with numbers that cost no memory, to see what its own forward computes."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest entry: what is compared ran in float32
_DECIDED: dict[Hashable, Any] = {}


def filled(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers of `shape` that look random, in float32 on the host; rows overlap, so that a large one costs little."""
    if not shape:
        return torch.tensor(1.5)
    strides = (*(7 + 6 * i for i in range(len(shape) - 1, 0, -1)), 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    numbers = torch.randn(max(size, 1), generator=torch.Generator().manual_seed(seed)) / max(shape[-1], 1) ** 0.5
    return numbers.as_strided(shape, strides)


def twin(module: nn.Module, given: Mapping[str, Tensor]) -> Any:
    """A copy of `module` on the host whose parameters are `given`, by name, others being filled; meta buffers too."""
    memo: dict[int, Any] = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        numbers = given[name] if name in given else filled(tuple(parameter.shape), number)
        memo[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = filled(tuple(buffer.shape)).to(buffer.dtype) if buffer.is_meta else buffer.detach().cpu()
    config = getattr(module, "config", None)
    if config is not None:
        memo[id(config)] = config
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Where nothing around (autograd, autocast, a default device such as meta) changes what is computed."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, not what a decorator put around it; its first argument is the module."""
    return inspect.unwrap(type(module).forward)


def same(one: Any, other: Any) -> bool:
    """Whether two results are tensors that differ by rounding alone."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    gap = (one.float() - other.float()).abs().max()
    return bool(gap <= TOLERANCE * one.float().abs().max().clamp_min(1e-6))


def once(question: str, module: nn.Module, answer: Callable[[], Any]) -> Any:
    """`answer()`, asked once for all modules that are alike: of one class, size and settings."""
    simple = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "training"}
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    children = tuple((name, type(child)) for name, child in module.named_modules())
    key: Hashable = (question, type(module), type(module).forward, tuple(sorted(simple.items())), shapes, children)
    if key not in _DECIDED:
        _DECIDED[key] = answer()
    return _DECIDED[key]
