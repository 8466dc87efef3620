"""The original's predictions for an update, made by a process that has nothing else to do in it.

Where an update has fewer rows than there are processes, each row is of one of them, which learns; the body of the
original, of which no gradient is asked, runs on another meanwhile, and what leaves it is handed over. The head is
applied where it is needed: logits are many times as many numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lillama.base import ranks, shares
from lillama.pretrained.predictions import Body, positions_at_once, with_hidden


@dataclass(frozen=True)
class Help:
    """Of one row of an update: its number in its batch, the process that learns from it, and the one that helps."""

    row: int
    learner: int
    helper: int


def share_out(counts: Sequence[int], teacher: Any) -> list[list[Help]]:
    """Who helps whom with an update, for each of its batches of `counts` rows; nobody where none is idle."""
    total, world = sum(counts), ranks.world()
    if teacher is None or total >= world or positions_at_once(teacher, 1) is None:
        return [[] for _ in counts]
    learners = {row: number for number in range(world) for row in shares.part(total, number)}
    idle = [number for number in range(world) if number not in learners.values()]
    found, start = [], 0
    for count in counts:
        rows = range(start, start + count)
        found.append([Help(row - start, learners[row], idle[row % len(idle)]) for row in rows])
        start += count
    return found


@torch.no_grad()
def help_with(teacher: Any, given: Mapping[str, Tensor], learner: int) -> None:
    """Run the body of `teacher` on the model's arguments of one row, and hand what leaves it to `learner`."""
    body = Body(teacher, given)
    ranks.hand(with_hidden(body.output, body.hidden.cpu()), learner)


class Elsewhere:
    """The original for the process that learns: its head is here, and what leaves its body comes from `helper`.

    It can be asked once, for the row that the helper runs.
    """

    def __init__(self, teacher: Any, helper: int) -> None:
        self.teacher, self.helper = teacher, helper

    def body(self, given: Mapping[str, Tensor]) -> Body:
        """The body that ran, waited for until it is here."""
        output = ranks.receive(self.helper)
        return Body(self.teacher, given, with_hidden(output, output[0].to(given["input_ids"].device)))

    def __call__(self, **given: Any) -> SimpleNamespace:
        """The logits of all positions, as the original gives them."""
        arguments = {name: value for name, value in given.items() if name != "use_cache"}
        return SimpleNamespace(logits=self.body(arguments).logits(torch.arange(arguments["input_ids"].shape[1])))
