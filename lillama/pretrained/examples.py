"""Small copies of a model that can be run, and arguments to run them on, for whoever wants to see what a model does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH = 2, 12
SMALL = 64_000_000  # parameters that are made without much thought
LARGE = 1_500_000_000
VOCABULARY = 512
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
MOST_LAYERS = 8  # that a copy keeps: enough for every kind of layer a model alternates between

Arguments = dict[str, Tensor]


def copies(model: Any) -> Iterator[Any]:
    """Copies of `model` with random weights that may be run, the truest first: whole, less deep, or on no device."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if count <= SMALL:
        yield _made(model, model.config, "cpu")
    less = _less_deep(model.config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in type(model)._from_config(copy.deepcopy(less)).parameters())
    if size <= LARGE:
        yield _made(model, less, "cpu")
    yield _made(model, model.config, "meta")


def _made(model: Any, config: Any, device: str) -> Any:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        with torch.device(device):
            made = type(model)._from_config(copy.deepcopy(config), dtype=torch.float32).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.is_meta:
                    continue
                flat = parameter.flatten()
                if not bool(parameter.isfinite().all()):
                    parameter.normal_(std=0.02)  # what its class leaves as the memory was
                elif flat.numel() > 1 and bool((flat == flat[0]).all()):
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)  # so that nothing is the same by chance
    finally:
        torch.set_rng_state(state)
    return made


def _less_deep(config: Any) -> Any:
    """A configuration of fewer layers and words."""
    less = copy.deepcopy(config)
    for section in (less, *(value for value in vars(less).values() if hasattr(value, "to_dict"))):
        for name in LAYERS:
            if isinstance(count := getattr(section, name, None), int) and count > MOST_LAYERS:
                setattr(section, name, MOST_LAYERS)
                for key, value in list(vars(section).items()):
                    if isinstance(value, list) and len(value) == count:
                        setattr(section, key, value[:MOST_LAYERS])
        if isinstance(getattr(section, "vocab_size", None), int) and section.vocab_size > VOCABULARY:
            section.vocab_size = VOCABULARY
            if isinstance(getattr(section, "pad_token_id", None), int) and section.pad_token_id >= VOCABULARY:
                section.pad_token_id = 0
    return less


@dataclass(frozen=True)
class Text:
    """What texts to try are like: `length` tokens, from `first` (less are special) to `end`."""

    length: int = LENGTH
    first: int = 8
    end: int = VOCABULARY


def arguments_to_try(model: nn.Module, text: Text | None = None) -> Iterator[Arguments]:
    """Arguments that a model may run on, the plainest first: token ids, images, or sound."""
    anything: Any = model
    config, main = anything.config, anything.main_input_name
    text = text or Text()
    names = set(inspect.signature(type(model).forward).parameters)
    decoder = {"decoder_input_ids": _ids(config, text)} if "decoder_input_ids" in names else {}
    books = getattr(config, "num_codebooks", None)
    if isinstance(books, int) and main == "input_ids":  # one row of tokens for every codebook
        yield {"input_ids": _ids(config, text).repeat(books, 1)}
        yield {"input_ids": _ids(config, text)[..., None].repeat(1, 1, books + 1)}
    for first in _first_arguments(config, main, names, text):
        tries = [decoder, {}] if config.is_encoder_decoder or main != "input_ids" else [{}, decoder]
        for more in tries:
            yield first | more
            if "attention_mask" in names:
                rows, length = next(iter(first.values())).shape[:2]
                yield first | more | {"attention_mask": torch.ones(rows, length, dtype=torch.int64)}


def altered(given: Mapping[str, Tensor]) -> Arguments:
    """The same arguments with other tokens (or numbers) in them: shapes and masks stay as they are."""
    return {
        name: value if "mask" in name else value * 0.5 if value.is_floating_point() else value.roll(1, -1)
        for name, value in given.items()
    }


def _first_arguments(config: Any, main: str, names: set[str], like: Text) -> Iterator[Arguments]:
    text = {"input_ids": _ids(config, like, 1)}
    if main == "input_ids":
        yield text
    if "pixel_values" in names:
        side = _said(config, ("image_size",), 32)
        frames = getattr(config, "num_frames", None)
        yield {
            "pixel_values": _numbers(*((frames,) if frames else ()), _said(config, ("num_channels",), 3), side, side)
        }
    if "input_values" in names:
        yield {"input_values": _numbers(1200)}
        yield {"input_values": _numbers(_said(config, ("max_length",), 64), _said(config, ("num_mel_bins",), 16))}
        yield {"input_values": _numbers(1, 1200)}
    if "input_features" in names:
        mels = _said(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim"), 16)
        frames = 2 * _said(config, ("max_source_positions",), 32)
        for shape in ((mels, frames), (frames, mels), (mels, 64), (64, mels), (mels, 8 * like.length)):
            yield {"input_features": _numbers(*shape)}
            if "input_ids" in names:
                yield {"input_features": _numbers(*shape)} | text
    if main != "input_ids" and "input_ids" in names:
        yield text
    if "bbox" in names:
        yield text | {"bbox": torch.ones(ROWS, like.length, 4, dtype=torch.int64)}


def _said(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    """What a configuration, or one inside it, says under the first of `names`."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    found = (getattr(one, name, None) for one in (config, *inside) for name in names)
    first = next((value for value in found if isinstance(value, int | list | tuple) and value), otherwise)
    return int(first) if isinstance(first, int) else int(first[0])


def _ids(config: Any, text: Text, seed: int = 0) -> Tensor:
    """Token ids, none of the first few, which are special."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 32
    first = min(text.first, vocabulary // 2)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, min(vocabulary, text.end), (ROWS, text.length), generator=generator)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(2))
