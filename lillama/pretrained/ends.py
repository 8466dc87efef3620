"""A token embedding and an output head as layers, around blocks that a plugin listed without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.pretrained.forms import Record
from lillama.pretrained.trace import join, watch_passes

KEY = "compress.embedding"


def with_ends(model: Any, layers: Sequence[Layer]) -> list[Layer]:
    """`layers` of `model` (a skeleton) with its embedding before them, its head behind, and what stands between.

    One forward pass of a small copy says whether the first layer is given what the embedding returns, and the head
    what the last layer (or a norm behind it) returns. A model without a head of its own gets the embedding alone.
    Raises LillamaError where the model does more between them, or uses its embedding more than once.
    """
    embedding = _asked(lambda: Layer.of_embedding(model))
    head = _asked(lambda: Layer.of_head(model)) if model.get_output_embeddings() is not None else None
    run, other = watch_passes(model)
    for one in (run, other):
        if one is not None:
            one.records[embedding.name] = [_as(record, embedding) for record in one.records.get(embedding.name, [])]
    if len(run.records[embedding.name]) != 1:
        count = len(run.records[embedding.name])
        raise LillamaError(
            f"the token embedding '{embedding.name}' is run {count} times in one pass (its numbers may be used under "
            "other names), and can only be the first layer of one stream",
            where=KEY,
            hint="Leave the key out; the blocks are compressed without it.",
        )
    seen = [layer.name for layer in layers if layer.name in run.records]
    below = join(run, other, [embedding.name], seen)
    if below is None:
        raise _apart(f"what '{embedding.name}' returns", f"'{seen[0]}'")
    whole = [embedding, *_between(below, [embedding.name], seen), *layers]
    if head is None:
        return whole
    above = join(run, other, below, [head.name])
    if above is None:
        raise _apart(f"what '{seen[-1]}' returns", f"the head '{head.name}'")
    return [*whole, *_between(above, below, [head.name]), head]


def _as(record: Record, layer: Layer) -> Record:
    """The record of the embedding: what enters it are numbers of tokens, as of no other layer."""
    return replace(record, layer=layer)


def _between(whole: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Layer]:
    """The modules that were found between two parts of a stream, which are passed through."""
    return [Layer(name) for name in whole[len(first) : len(whole) - len(second)]]


def _asked(make: Callable[[], Layer]) -> Layer:
    try:
        return make()
    except ValueError as error:
        raise LillamaError(str(error), where=KEY, hint="Leave the key out.") from error


def _apart(given: str, taker: str) -> LillamaError:
    return LillamaError(
        f"{given} does not reach {taker} unchanged: the model does more between them than run modules one by one",
        where=KEY,
        hint="Leave the key out; the blocks are compressed without it.",
    )
