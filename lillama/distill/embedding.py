"""A student embedding while it learns: its loss on tokens of the whole vocabulary, its error before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.factorise.embedding import CHUNK
from lillama.factorise.initialisers import TINY
from lillama.lowrank.embedding import LowRankEmbedding

FREQUENT = 0.8  # share of the text that the frequent tokens make up, the most frequent first
MOST_DRAWN = 4096  # tokens of the vocabulary per step


class VocabularyLoss:
    """A student embedding's loss on tokens of the whole vocabulary, and its error before and after."""

    def __init__(self, table: Tensor, student: LowRankEmbedding, floor: float) -> None:
        """`table` is the original, kept where it is given: on the host where the device is short of memory."""
        self.original = table
        self.floor = floor
        self.before = row_errors(table, *student.factors())
        self.after = self.before

    def add_to(
        self, distance: Tensor, student: nn.Module, objective: Callable[..., Tensor], tokens: int, seed: int
    ) -> Tensor:
        """The mean distance over the text and, by the floor's weight, over as many tokens drawn from the vocabulary."""
        if not self.floor:
            return distance
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, len(self.original), (min(tokens, MOST_DRAWN),), generator=generator)
        rows = F.embedding(ids.to(self.original.device), self.original).to(distance.device)
        ids = ids.to(distance.device)
        # As far as the module's own scale (see lowrank/embedding.py) is concerned, these are the teacher's.
        wanted = cast(LowRankEmbedding, student).around(ids, rows).detach()
        even = objective(student(ids).float(), wanted.float()).mean()
        return (distance + self.floor * even) / (1 + self.floor)

    @torch.no_grad()
    def finish(self, student: LowRankEmbedding) -> None:
        """Take note of the error of the finished student."""
        self.after = row_errors(self.original, *student.factors())

    def report(self, counts: Tensor) -> dict[str, Any]:
        """How many tokens are frequent, rare and unseen, and their mean relative errors before and after training."""
        groups = frequency_groups(counts)
        return {
            "floor": self.floor,
            "tokens": {name: int(chosen.sum()) for name, chosen in groups.items()},
            "initial_error": by_frequency(self.before, counts),
            "error": by_frequency(self.after, counts),
        }


@torch.no_grad()
def row_errors(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """|w_t - a_t B| / |w_t| for every token, in float32 on the host.

    A vector of nearly no length (that of padding is 0) is compared to a hundredth of the mean length instead.
    """
    lengths, gaps = [], []
    for rows, a in zip(W.split(CHUNK), A.split(CHUNK)):
        rows = rows.float()
        lengths.append(rows.norm(dim=1).cpu())
        gaps.append((rows - (a.float() @ B.float()).to(rows.device)).norm(dim=1).cpu())
    length = torch.cat(lengths)
    return torch.cat(gaps) / length.clamp_min(max(float(length.mean()) / 100, TINY))


def by_frequency(errors: Tensor, counts: Tensor) -> dict[str, float]:
    """Mean relative errors of the vectors of frequent, rare and unseen tokens, and over the text (`mean`).

    Frequent are the fewest tokens that make up FREQUENT of the text, rare the others that occur in it.
    """
    groups = frequency_groups(counts)
    found = {name: float(errors[chosen].mean()) for name, chosen in groups.items() if chosen.any()}
    return found | {"mean": float((errors * counts).sum() / counts.sum().clamp_min(1))}


def frequency_groups(counts: Tensor) -> dict[str, Tensor]:
    """Masks [vocabulary] of the frequent, rare and unseen tokens."""
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[(before < FREQUENT * counts.sum()) & (counts[order] > 0)]] = True
    return {"frequent": frequent, "rare": ~frequent & (counts > 0), "unseen": counts == 0}
