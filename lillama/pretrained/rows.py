"""Batches shared out among the processes of a run: whole ones, or the rows of each.

Where nothing but sums is wanted every process takes batches of its own. A step of learning is one of the whole batch,
though: each process takes some of its rows, its losses are divided by what counts in all of them, and what gradients
add up to is the gradient of one process. A process for which no row is left works on one of another's, which counts for
nothing: so all of them do the same things in the same order.
"""

from __future__ import annotations

from torch import Tensor

from lillama.base import ranks, shares
from lillama.pretrained.calls import Batch, Call, Capture, RawBatch

DIGEST = "digest"  # of the batch as a whole


def own_rows(batch: RawBatch, number: int) -> tuple[RawBatch, bool]:
    """The rows of a batch that are this process's, and whether they count.

    Where its tensors do not have as many rows each, the rows belong together: the batch is one process's, by its
    `number`, in turn.
    """
    divided = {name: value for name, value in batch.items() if name != DIGEST}
    sizes = {value.shape[_rows_at(name)] if value.dim() > _rows_at(name) else 0 for name, value in divided.items()}
    if len(sizes) != 1:
        return batch, number % ranks.world() == ranks.rank()
    count = sizes.pop()
    mine = shares.part(count)
    # Where there is none, the last stands in.
    first, some = (mine.start, len(mine)) if len(mine) else (count - 1, 1)
    rows = {name: value.narrow(_rows_at(name), first, some) for name, value in divided.items()}
    return {**batch, **rows}, bool(len(mine))


def _rows_at(name: str) -> int:
    """The dimension of an argument in which it has rows: a tuple of one tensor is given as [1, B, ...]."""
    return 1 if name == "encoder_outputs" else 0


def capture_whole(capture: Capture, raw: RawBatch, number: int) -> tuple[Batch, Tensor]:
    """A batch as the layers see it, and what enters the first of them."""
    batch, hidden = capture(raw)
    batch.number = number
    return batch, hidden


def capture_rows(capture: Capture, raw: RawBatch, number: int) -> tuple[Batch, Tensor]:
    """This process's rows of a batch as the layers see them, and what enters the first layer; all processes call it."""
    if ranks.world() == 1:
        return capture_whole(capture, raw, number)
    mine, counts = own_rows(raw, number)
    batch, hidden = capture_whole(capture, mine, number)
    batch.counts = counts
    _weigh(batch)
    return batch, hidden


def _weigh(batch: Batch) -> None:
    """Have a batch know how much of the whole its rows are, by what each layer's loss counts."""
    own = [float(batch.tokens), *map(_count, batch.calls)]
    own = own if batch.counts else [0.0] * len(own)
    tokens, *counts = ranks.summed(own)
    batch.tokens = round(tokens)
    for call, mine, whole in zip(batch.calls, own[1:], counts):
        call.share = mine / max(whole, 1.0)


def _count(call: Call) -> float:
    """How many tokens a layer's loss counts, or where all do, how many rows."""
    return float(call.shapes[0][0] if call.loss_mask is None else call.loss_mask.sum())
