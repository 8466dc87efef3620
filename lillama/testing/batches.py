"""What a model is run on while it is checked: random inputs, or the first batches of its plugin's own stream."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from lillama import host
from lillama.errors import LillamaError
from lillama.run.prepare import Prepared

Batches = list[dict[str, Tensor]]

ENOUGH = 3  # batches: two to learn from and one that is held out
SAMPLES = 4000  # of a random waveform


def token_batches(model: Any, *, batches: int = ENOUGH, batch_size: int = 2, length: int = 12) -> Batches:
    """Random token ids for `model`, seeded."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [
        {"input_ids": torch.randint(0, vocabulary, (batch_size, length), generator=generator)} for _ in range(batches)
    ]


def example_batches(model: Any, *, batches: int = ENOUGH, batch_size: int = 2) -> Batches:
    """Random inputs for `model`, seeded: token ids, of an encoder-decoder for both halves, images or waveforms.

    Raises LillamaError for a model that wants something else.
    """
    config, wanted = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if wanted == "input_ids":
        found = token_batches(model, batches=batches, batch_size=batch_size)
        if config.is_encoder_decoder:
            answers = token_batches(model, batches=2 * batches, batch_size=batch_size, length=7)[batches:]
            for batch, answer in zip(found, answers):
                batch["decoder_input_ids"] = answer["input_ids"]
        return found
    if wanted == "pixel_values":
        side = config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        shape: tuple[int, ...] = (batch_size, getattr(config, "num_channels", 3), height, width)
    elif wanted == "input_values":
        shape = (batch_size, SAMPLES)
    else:
        raise LillamaError(
            f"{type(model).__name__} runs on '{wanted}', for which nothing random is known",
            hint="In a test, give check_architecture its batches; or let the plugin's calibration_stream make them.",
        )
    return [{wanted: torch.randn(shape, generator=generator)} for _ in range(batches)]


def batches_for(prepared: Prepared, dataset: str | None = None) -> Batches:
    """A few batches of the plugin's own stream over `dataset`, or random ones where the plugin has no stream.

    `prepared.recipe` must name `dataset` as its calibration data. Raises LillamaError where the stream cannot do
    without data, or where data was given that nothing would read.
    """
    plugin, model = prepared.plugin, prepared.source.model
    stream = None
    try:
        stream = host.get().calibration_stream(plugin, model, prepared.recipe)
        found = None if stream is None else list(itertools.islice(stream, ENOUGH))
    except LillamaError as error:
        if dataset is not None:
            raise
        raise LillamaError(
            f"the plugin {plugin.name} makes its own batches, and has none to make them of: {error.what}",
            where="--data",
            hint="Give a data set that it reads: --data FILE.",
        ) from error
    if found:
        return found
    if dataset is not None:
        raise LillamaError(
            f"the plugin {plugin.name} reads no data of its own, so random inputs are used",
            where="--data",
            hint="Leave it out.",
        )
    return example_batches(model)
