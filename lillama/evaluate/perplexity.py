"""Perplexity of a text, in the convention of the GPTQ and SVD-LLM papers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lillama.data.render import render_rows
from lillama.data.rows import is_lines, load_rows
from lillama.errors import LillamaError
from lillama.evaluate.context import Context

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 256  # whose float32 log-softmax is in memory at once
TAIL = 64  # tokens near a cut in the text that may differ from those of the whole


def perplexity(
    model: Any,
    context: Context,
    *,
    dataset: Annotated[
        str,
        Field(description="Hub id, a .txt/.jsonl/.json/.parquet/.csv file, a folder of such, or package:MODULE."),
    ],
    config: Annotated[str | None, Field(description="Configuration of a hub data set.")] = None,
    split: Annotated[str, Field(description="Split, slices allowed: test[:10%].")] = "test",
    column: Annotated[str | None, Field(description="Column of the text; null: found by its usual names.")] = None,
    sequence_length: Annotated[int, Field(ge=2, description="Tokens per window; at most the model's positions.")] = 512,
    batch_size: Annotated[int, Field(ge=1, description="Windows per forward pass.")] = 4,
    tokens: Annotated[int | None, Field(ge=2, description="How many tokens to read at most; null: all.")] = None,
) -> dict[str, float]:
    """{"perplexity", "tokens"}: exp of the mean negative log-likelihood, and how many tokens it is over.

    Rows in order are joined by blank lines (those of a .txt file by line ends, which is the file itself),
    tokenised as one text and cut into windows that do not overlap; the last partial window is dropped unless it
    is the only one. The first token of a window is given, not predicted. A likelihood that is not finite
    gives inf. Raises LillamaError where there are fewer than two tokens.
    """
    length = min(sequence_length, positions(model) or sequence_length)
    ids = windows(
        context.tokenizer,
        context.where,
        dataset=dataset,
        config=config,
        split=split,
        column=column,
        sequence_length=length,
        tokens=tokens,
    )
    return score(model, ids, batch_size, context.device)


def windows(
    tokenizer: Any,
    where: str,
    *,
    dataset: str,
    config: str | None = None,
    split: str = "test",
    column: str | None = None,
    sequence_length: int = 512,
    tokens: int | None = None,
) -> Tensor:
    """A text's ids [N, sequence_length] as `perplexity` reads it; shorter windows where the text is shorter."""
    import torch

    rows = load_rows(dataset, config=config, split=split, where=where)
    text = ("\n" if is_lines(rows) else "\n\n").join(render_rows(rows, tokenizer, column, where))
    ids = _encode(tokenizer, text, tokens)
    if len(ids) < 2:
        raise LillamaError(
            f"'{split}' of '{dataset}' has {len(ids)} tokens, too few for a perplexity",
            where=f"{where}.dataset",
            hint="Give more text.",
        )
    length = min(sequence_length, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def score(model: Any, windows: Tensor, batch_size: int, device: str) -> dict[str, float]:
    """{"perplexity", "tokens"} of token ids [N, T], every position but the first of a window predicted."""
    import torch

    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.inference_mode():
            for ids in windows.split(batch_size):
                ids = ids.to(device)
                losses = token_losses(model(input_ids=ids, use_cache=False).logits, ids)
                total += losses.cpu().double().sum().item()
                count += losses.numel()
    finally:
        model.train(training)
    return {"perplexity": exponential(total / count), "tokens": float(count)}


def exponential(mean: float) -> float:
    """exp, or infinity: it overflows beyond 709, where the number says no more than that anyway (NaN: infinity)."""
    return math.exp(mean) if mean < 700 else math.inf


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood [B * (T - 1)] in float32 of ids [B, T] under logits [B, T, V]."""
    import torch
    from torch.nn import functional as F

    losses = []
    for row, targets in zip(logits[:, :-1], ids[:, 1:].to(logits.device)):
        # By slices: a copy in float32 of all logits of a batch takes gigabytes.
        for some, wanted in zip(row.split(POSITIONS), targets.split(POSITIONS)):
            losses.append(F.cross_entropy(some.float(), wanted.long(), reduction="none"))
    return torch.cat(losses)


def _encode(tokenizer: Any, text: str, most: int | None) -> list[int]:
    """The ids of the text as one, the first `most` of them; no more is tokenised than they need."""
    end = len(text) if most is None else 8 * (most + TAIL)
    while True:
        # verbose=False: the text is longer than the model's window on purpose.
        ids = tokenizer(text[:end], return_attention_mask=False, verbose=False)["input_ids"]
        if end >= len(text) or (most is not None and len(ids) >= most + TAIL):
            return list(ids if most is None else ids[:most])
        end *= 4


def positions(model: Any) -> int | None:
    """How many positions the model has, where that is limited."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
