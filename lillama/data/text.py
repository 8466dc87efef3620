"""Calibration text as token blocks: of one data set, of several, and of what the model wrote itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama.data.stream import stream_blocks
from lillama.errors import LillamaError
from lillama.recipe.calibration import OF_ONE, Data

if TYPE_CHECKING:
    from lillama.recipe.schema import Calibration

OwnText = Callable[[], Path]  # the file of what the model wrote itself, written by then


def token_blocks(
    tokenizer: Any,
    calibration: Calibration,
    where: str = "calibration",
    progress: Callable[[int], None] | None = None,
    own: OwnText | None = None,
) -> Tensor:
    """The calibration text as int64 blocks [N, sequence_length], at most `calibration.tokens` in all.

    See `sourced_blocks`.
    """
    return sourced_blocks(tokenizer, calibration, where, progress, own=own)[0]


def sourced_blocks(
    tokenizer: Any,
    calibration: Calibration,
    where: str = "calibration",
    progress: Callable[[int], None] | None = None,
    ended: bool = True,
    own: OwnText | None = None,
) -> tuple[Tensor, Tensor]:
    """The calibration text as int64 blocks [N, sequence_length], and of which source each is [N].

    Sources are numbered as in `calibration.weights`: data sets, then what the model wrote. There are at most
    `calibration.tokens` in all. What becomes of one source is said at `stream_blocks`. A mixture has exactly
    tokens // sequence_length blocks, shared out by weight (rounded down, the rest to the largest remainders), every
    block of one source alone, and all of them shuffled by `seed`. `own` is asked for the model's own text once all data
    sets were read. Raises LillamaError where a source has less than its share, or if there is not one block.
    """
    if not calibration.is_mixture and calibration.generate is None:
        blocks = stream_blocks(tokenizer, calibration, where, progress, ended)
        return blocks, torch.zeros(len(blocks), dtype=torch.int64)
    found: list[Tensor] = []
    for given, place in _sources(calibration, where, own):
        blocks = stream_blocks(tokenizer, given, place, progress, ended)
        if not calibration.is_mixture:
            return blocks, torch.zeros(len(blocks), dtype=torch.int64)
        if blocks.numel() < (given.tokens or 0):
            raise LillamaError(
                f"'{given.dataset}' has {blocks.numel()} tokens in whole sequences, and {given.tokens} are its share",
                where=place,
                hint="Give more text, lower its weight, or lower tokens.",
            )
        found.append(blocks)
    order = torch.randperm(sum(map(len, found)), generator=torch.Generator().manual_seed(calibration.seed))
    sources = torch.arange(len(found)).repeat_interleave(torch.tensor([len(blocks) for blocks in found]))
    return torch.cat(found)[order], sources[order]


def _sources(calibration: Calibration, where: str, own: OwnText | None) -> Iterator[tuple[Calibration, str]]:
    """The calibration on each source alone, and its key in the recipe; what the model wrote comes last."""
    wanted = wanted_tokens(calibration, where)
    for i, part in enumerate(calibration.parts):
        place = where if calibration.dataset is not None else f"{where}.datasets.{i}"
        yield calibration.model_copy(update=_of_one(part) | {"tokens": wanted[i]}), place
    section, place = calibration.generate, f"{where}.generate"
    if section is not None:
        if own is None:
            raise LillamaError("nothing here has the model write its own text", where=place)
        written = _of_one(Data.model_validate({"dataset": str(own()), "split": section.split}))
        yield calibration.model_copy(update=written | {"tokens": wanted[-1], "fraction": 1.0}), place


def wanted_tokens(calibration: Calibration, where: str) -> list[int | None]:
    """The tokens of every source; of one that is alone as many as there may be.

    Raises LillamaError where a source of a mixture would give less than a sequence.
    """
    if not calibration.is_mixture:
        return [calibration.tokens]
    shares = calibration.shares
    if not all(shares):
        raise LillamaError(
            f"of {calibration.tokens} tokens in sequences of {calibration.sequence_length}, not every source has one",
            where=f"{where}.tokens",
            hint="Raise it, or lower sequence_length.",
        )
    return list(shares)


def _of_one(part: Data) -> dict[str, Any]:
    """The keys of a calibration on that data set alone."""
    alone = {"datasets": None, "generate": None, "dataset": part.dataset}
    return alone | {name: getattr(part, name) for name in OF_ONE}
