"""The text of one data set as token blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama.data.render import render_rows
from lillama.data.rows import is_lines, keep_rows, load_rows
from lillama.data.special import Around, cut, find_around, text_tokenizer
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset

    from lillama.recipe.schema import Calibration

CHARACTERS_PER_TOKEN = 4  # of English prose, roughly; only sizes the chunks of a .txt file
ROWS_AT_ONCE = 64  # per call of the tokenizer: enough for its threads, little to throw away at the end


def stream_blocks(
    tokenizer: Any,
    calibration: Calibration,
    where: str = "calibration",
    progress: Callable[[int], None] | None = None,
    ended: bool = True,
) -> Tensor:
    """The text of the one data set `calibration.dataset` as int64 blocks [N, sequence_length].

    They have at most `calibration.tokens` in all. Rows that pass `filter` are shuffled by `seed`, `fraction` of them,
    at most `rows`, kept, rendered, tokenised with the tokenizer's usual special tokens, ended by EOS, joined and cut;
    what does not fill a block at the end is dropped. The lines of a .txt file first become chunks of about a block's
    length (see `chunks`), which are shuffled.
    With `special_tokens: auto` every block has around it what the tokenizer puts around a text ([CLS] ... [SEP]; but
    without `ended` only before it), and rows are then parted by what ends a text. `progress` is called with the number
    of tokens so far. Raises LillamaError if there is not one block.
    """
    tokenizer = text_tokenizer(tokenizer)
    length, most = calibration.sequence_length, calibration.tokens
    if most is not None and most < length:
        raise LillamaError(
            f"{most} tokens are fewer than one sequence of {length}",
            where=f"{where}.tokens",
            hint=f"Raise it, or lower {where}.sequence_length.",
        )
    around = find_around(tokenizer, calibration.special_tokens)
    around = around if ended else Around(around.before)
    around.room(length, where)
    dataset = calibration.one_dataset()
    rows = load_rows(dataset, config=calibration.config, split=calibration.split, where=where)
    rows = keep_rows(rows, calibration.filter, where)
    pieces: list[Tensor] = []
    total = 0
    texts = (text for text in _texts(rows, tokenizer, calibration, where) if text.strip())
    while batch := list(itertools.islice(texts, ROWS_AT_ONCE)):
        for ids in _encode(tokenizer, batch, around):
            pieces.append(torch.tensor(ids, dtype=torch.int64))
            total += len(ids)
        if progress:
            progress(total if most is None else min(total, most))
        if most is not None and total >= most:
            break
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    blocks = cut(stream, length, around, total if most is None else most // length)
    if not blocks:
        raise LillamaError(
            f"the text of '{dataset}' has {total} tokens, fewer than one sequence of {length}",
            where=f"{where}.dataset",
            hint="Give more text, or lower sequence_length.",
        )
    return torch.stack(blocks)


def chunks(lines: Iterable[str], characters: int) -> Iterator[str]:
    """Consecutive pieces of a text, cut at line ends, that joined give the text back.

    A piece ends at the first blank line after `characters`, or, where none comes, at the first line end
    after twice as many; so paragraphs stay whole and lines are never torn.
    """
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(f"{line}\n")
        size += len(line) + 1
        if size >= (characters if not line.strip() else 2 * characters):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _texts(rows: Dataset, tokenizer: Any, calibration: Calibration, where: str) -> Iterator[str]:
    """The texts to tokenise: a share of the rows, or of the chunks of running text, in shuffled order."""

    def chosen(count: int) -> list[int]:
        generator = torch.Generator().manual_seed(calibration.seed)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[: math.ceil(calibration.fraction * count)]

    if is_lines(rows):
        size = CHARACTERS_PER_TOKEN * calibration.sequence_length
        pieces = list(chunks(render_rows(rows, tokenizer, None, where), size))
        return _at_most(calibration.rows, (pieces[i] for i in chosen(len(pieces))))
    rows = rows.select(chosen(len(rows))[: calibration.rows])
    return render_rows(rows, tokenizer, calibration.column, where)


def _at_most(lines: int | None, pieces: Iterator[str]) -> Iterator[str]:
    """The first pieces that have `lines` lines with text in them, the last one cut there."""
    left = lines
    for piece in pieces:
        if left is not None:
            kept: list[str] = []
            for line in piece.splitlines(keepends=True):
                if not left:
                    break
                kept.append(line)
                left -= bool(line.strip())
            piece = "".join(kept)
        if piece:
            yield piece
        if left == 0:
            return


def _encode(tokenizer: Any, texts: list[str], around: Around) -> Iterator[list[int]]:
    """Token ids of every text, begun and ended once even where a chat template wrote BOS or EOS already.

    What ends a block ends every text as well; such texts are not begun, for a [CLS] stands at no other place.
    """
    begin, end, end_id = tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id
    begun = [(bool(begin) and text.startswith(begin)) or bool(around.after) for text in texts]
    encoded: dict[bool, Iterator[list[int]]] = {}
    for state in set(begun):
        part = [text for text, is_begun in zip(texts, begun) if is_begun is state]
        ids = tokenizer(part, add_special_tokens=not state, return_attention_mask=False, verbose=False)
        encoded[state] = iter(ids["input_ids"])
    after = list(around.after)
    for text, state in zip(texts, begun):
        ids = list(next(encoded[state]))
        if after:
            yield ids if ids[-len(after) :] == after else ids + after
            continue
        if end and end_id is not None:
            while ids[-2:] == [end_id, end_id]:  # the template's and the tokenizer's own
                ids.pop()
            if ids[-1:] != [end_id] and not text.rstrip().endswith(end):
                ids.append(end_id)
        yield ids
