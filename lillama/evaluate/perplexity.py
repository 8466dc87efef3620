"""Perplexity of a text, in the convention of the GPTQ and SVD-LLM papers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lillama.base import ranks, shares
from lillama.data.render import render_rows
from lillama.data.rows import is_lines, load_rows
from lillama.data.special import Around, find_around, text_tokenizer
from lillama.errors import LillamaError
from lillama.evaluate.context import Context, shared_out

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 256  # whose float32 log-softmax is in memory at once, at most
AT_ONCE = 1 << 24  # logits of them
TAIL = 64  # tokens near a cut in the text that may differ from those of the whole

SpecialTokens = Literal["auto", "text"]


@dataclass(frozen=True)
class Windows:
    """Token ids [N, T] of a text; the first `given` of every window are not predicted, `before` are special ones."""

    ids: Tensor
    before: tuple[int, ...] = ()

    @property
    def given(self) -> int:
        """How many tokens of a window are not predicted: the special ones before the text, or its first one."""
        return Around(self.before).given

    def described(self, tokenizer: Any, special_tokens: str) -> dict[str, Any]:
        """What the report is told of them."""
        names = text_tokenizer(tokenizer).convert_ids_to_tokens(list(self.before))
        return {"special_tokens": special_tokens, "before": names, "length": self.ids.shape[1]}


@shared_out
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
    special_tokens: Annotated[
        SpecialTokens,
        Field(
            description="auto: every window begins with the special tokens that the tokenizer puts before a text, BOS; "
            "they count towards its length; text: they stand at the start of the text alone, as in the papers."
        ),
    ] = "auto",
) -> dict[str, float]:
    """{"perplexity", "tokens"}: exp of the mean negative log-likelihood, and how many tokens it is over.

    Rows in order are joined by blank lines (those of a .txt file by line ends, which is the file itself),
    tokenised as one text and cut into windows that do not overlap; the last partial window is dropped unless it
    is the only one. The special tokens before a window's text are given, not predicted; where there are none, its
    first token is. `context.details["windows"]` says which they are. A likelihood that is not finite gives inf. Raises
    LillamaError where there are fewer than two tokens.
    """
    length = min(sequence_length, positions(model) or sequence_length)
    found = windows(
        context.tokenizer,
        context.where,
        dataset=dataset,
        config=config,
        split=split,
        column=column,
        sequence_length=length,
        tokens=tokens,
        special_tokens=special_tokens,
    )
    context.details["windows"] = found.described(context.tokenizer, special_tokens)
    return score(model, found, batch_size, context.device)


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
    special_tokens: str = "auto",
) -> Windows:
    """A text's ids [N, sequence_length] as `perplexity` reads it; shorter windows where the text is shorter."""
    import torch

    tokenizer = text_tokenizer(tokenizer)
    # What ends a text by default would be predicted where none ends.
    around = Around(find_around(tokenizer, special_tokens).before)
    room = around.room(sequence_length, where)
    rows = load_rows(dataset, config=config, split=split, where=where)
    text = ("\n" if is_lines(rows) else "\n\n").join(render_rows(rows, tokenizer, column, where))
    ids = _encode(tokenizer, text, tokens, special_tokens != "auto")
    if len(ids) < 2:
        raise LillamaError(
            f"'{split}' of '{dataset}' has {len(ids)} tokens, too few for a perplexity",
            where=f"{where}.dataset",
            hint="Give more text.",
        )
    length = min(room, len(ids))
    count = len(ids) // length
    texts = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    return Windows(
        torch.cat([torch.tensor(around.before, dtype=torch.int64).expand(count, -1), texts], 1), around.before
    )


def score(model: Any, windows: Windows, batch_size: int, device: str) -> dict[str, float]:
    """{"perplexity", "tokens"} of windows of text under a model; the processes of a run share the batches out."""
    import torch

    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.inference_mode():
            for ids in shares.share(windows.ids.split(batch_size)):
                losses = token_losses(model, ids.to(device), windows.given)
                total += losses.cpu().double().sum().item()
                count += losses.numel()
    finally:
        model.train(training)
    total, tokens = ranks.summed([total, count])
    return {"perplexity": exponential(total / tokens), "tokens": tokens}


def exponential(mean: float) -> float:
    """exp, or infinity: it overflows beyond 709, where the number says no more than that anyway (NaN: infinity)."""
    return math.exp(mean) if mean < 700 else math.inf


def token_losses(model: Any, ids: Tensor, given: int = 1) -> Tensor:
    """Negative log-likelihood [B * (T - given)] in float32 of ids [B, T] under the model, the first `given` known."""
    import torch
    from torch.nn import functional as F

    from lillama.pretrained.predictions import in_chunks

    wanted = ids[:, given:].long()
    # Made first: small tensors that are kept between large ones that go leave holes in memory.
    losses = torch.empty(wanted.shape, device=ids.device)
    for at, logits in in_chunks(model, {"input_ids": ids}, range(given - 1, ids.shape[1] - 1)):
        step = max(min(POSITIONS, AT_ONCE // logits.shape[2]), 1)
        for number in range(len(ids)):
            # By slices: a copy in float32 of all logits of a batch takes gigabytes.
            for start in range(0, len(at), step):
                here = slice(at.start + start - given + 1, min(at.start + start + step, at.stop) - given + 1)
                some, target = logits[number, start : start + step], wanted[number, here].to(logits.device)
                losses[number, here] = F.cross_entropy(some.float(), target, reduction="none")
        del logits, some  # before the next are made
    return losses.flatten()


def _encode(tokenizer: Any, text: str, most: int | None, special: bool) -> list[int]:
    """The ids of the text as one, the first `most` of them; no more is tokenised than they need."""
    end = len(text) if most is None else 8 * (most + TAIL)
    while True:
        # verbose=False: the text is longer than the model's window on purpose.
        ids = tokenizer(text[:end], add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
        if end >= len(text) or (most is not None and len(ids) >= most + TAIL):
            return list(ids if most is None else ids[:most])
        end *= 4


def positions(model: Any) -> int | None:
    """How many positions the model has, where that is limited."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
