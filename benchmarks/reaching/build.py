"""Small random models of any class, and inputs that they run on."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from lillama.pretrained.examples import Text, arguments_to_try
from reaching import rules

Inputs = dict[str, Tensor]
LIMIT = 5_000_000  # parameters
TEXT = Text(16, *rules.TOKENS)


class TooLarge(Exception):  # noqa: N818  it is a finding, not an error
    """A configuration that stayed large."""


def build(model_class: type[Any], config: Any, seed: int = 0) -> Any:
    """A model in float32 with random weights, in eval mode; nothing in it is constant, so that losing it shows.

    Raises `TooLarge` for one of more than five million parameters.
    """
    with torch.device("meta"):
        skeleton = model_class._from_config(config)
    if (count := sum(p.numel() for p in skeleton.parameters())) > LIMIT:
        raise TooLarge(f"the small model has {count:,} parameters")
    del skeleton
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.isfinite().all()):
                parameter.normal_(std=0.02)  # what its class leaves uninitialised
            elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def find_inputs(model: Any) -> Inputs:
    """Arguments that `model` gives finite outputs on. Raises what the last try raised."""
    error: Exception = ValueError("no arguments to try")
    for inputs in arguments_to_try(model, TEXT):
        try:
            found = run(model, inputs)
        except Exception as raised:
            error = raised if isinstance(error, ValueError) or len(inputs) > 0 else error
            continue
        if bool(found.isfinite().all()):
            return inputs
        error = ValueError("the outputs are not finite")
    raise error


def run(model: Any, inputs: Inputs) -> Tensor:
    """The result of a forward pass, without a cache, as layers are driven."""
    names = inspect.signature(model.forward).parameters
    with torch.no_grad():
        return result(model(**inputs, **({"use_cache": False} if "use_cache" in names else {})))


def result(output: Any) -> Tensor:
    """The logits of an output, else its first tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    first = output[0]
    return first if isinstance(first, Tensor) else first[0]


def rounding(model: Any, inputs: Inputs, found: Tensor) -> float:
    """How far float32 is from float64 in a model's result, of its largest number; 0 where it cannot run in float64."""
    try:
        given = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        exact = run(copy.deepcopy(model).double(), given)
    except Exception:  # a type is fixed somewhere inside
        return 0.0
    return float((exact - found).abs().max() / exact.abs().max().clamp_min(1.0))


def batches(model: Any, inputs: Inputs, count: int = 6) -> list[Inputs]:
    """More batches like `inputs`, with other numbers, seeded."""
    generator = torch.Generator().manual_seed(1)
    return [{name: _other(name, value, generator) for name, value in inputs.items()} for _ in range(count)]


def _other(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith("mask") or value.dtype == torch.bool:
        return value
    if value.dtype.is_floating_point:
        return torch.randn(value.shape, generator=generator)
    return torch.randint(*_range(value), value.shape, generator=generator)


def _range(value: Tensor) -> tuple[int, int]:
    first, highest = rules.TOKENS[0], int(value.max())
    return (first if highest >= first else 0), highest + 1
