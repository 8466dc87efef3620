"""Small random models of any class, and inputs that they run on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reaching import rules

Inputs = dict[str, Tensor]
LIMIT = 5_000_000  # parameters
BATCH, LENGTH = 2, 16


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
    for inputs in candidates(model):
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


def candidates(model: Any) -> Iterator[Inputs]:
    """Sets of arguments to try, the plainest first."""
    names = set(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    decoder = {"decoder_input_ids": ids(model.config)} if "decoder_input_ids" in names else {}
    if "num_codebooks" in vars(model.config) and main == "input_ids":  # one row for every codebook
        yield {"input_ids": ids(model.config, 1).repeat(model.config.num_codebooks, 1)}
        yield {"input_ids": ids(model.config, 1)[..., None].repeat(1, 1, model.config.num_codebooks + 1)}
    for first in _firsts(model, main, names):
        full = next(iter(first.values()))
        mask = {"attention_mask": torch.ones(full.shape[0], full.shape[1], dtype=torch.long)} if full.ndim > 1 else {}
        for extra in ({}, decoder) if main == "input_ids" and not model.config.is_encoder_decoder else (decoder, {}):
            yield {**first, **extra}
            if "attention_mask" in names:
                yield {**first, **extra, **mask}


def _firsts(model: Any, main: str, names: set[str]) -> Iterator[Inputs]:
    config = model.config
    text = {"input_ids": ids(model.config, 1)}
    if main == "input_ids":
        yield text
    small = rules.TOKENS[0]
    if main == "pixel_values" or "pixel_values" in names:
        channels, side = getattr(config, "num_channels", 3), getattr(config, "image_size", 32)
        side = side if isinstance(side, int) else side[0]
        frames = getattr(config, "num_frames", None)
        yield {"pixel_values": floats(BATCH, *((frames,) if frames else ()), channels, side, side)}
    if "input_values" in names:
        yield {"input_values": floats(BATCH, 1200)}
        yield {"input_values": floats(BATCH, getattr(config, "max_length", 64), getattr(config, "num_mel_bins", 16))}
        yield {"input_values": floats(BATCH, 1, 1200)}
    if "input_features" in names or main == "input_features":
        mels = _first_of(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim"), 16)
        frames = 2 * _first_of(config, ("max_source_positions",), 32)
        for shape in ((mels, frames), (frames, mels), (mels, 64), (64, mels), (mels, 8 * LENGTH)):
            yield {"input_features": floats(BATCH, *shape)}
            if "input_ids" in names:
                yield {"input_features": floats(BATCH, *shape), **text}
    if main != "input_ids" and "input_ids" in names:
        yield text
    if "bbox" in names:
        yield {**text, "bbox": torch.zeros(BATCH, LENGTH, 4, dtype=torch.long) + small}


def _first_of(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of these attributes in a configuration or one inside it."""
    nested = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    found = (getattr(one, name, None) for one in (config, *nested) for name in names)
    return next((value for value in found if isinstance(value, int)), default)


def ids(config: Any, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    first, end = rules.TOKENS
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or end
    return torch.randint(first, min(end, vocabulary), (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))
