"""What can be known of a weight: the words that statistics, initialisers and sensitivity share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lillama.base import ranks
from lillama.base.finite import is_finite
from lillama.errors import LillamaError

SAMPLE = 4096  # tokens of a layer kept for experts that saw few


@dataclass(frozen=True)
class WeightStatistics:
    """What is known of one weight; None: not measured. Of stacked weights every tensor has one more dimension in front.

    `gram` (d_in x d_in), `output_gram` (d_out x d_out) and `cross` are those of initialisers.py; `input_fisher` and
    `output_fisher` those of sensitivity.py; of an embedding `counts` says how often each token occurs, at least the
    floor, and `head_gram` is the Gram of a head that is tied to it. `left` is what is left of the weight itself, where
    it loses neurons: the others are of that.
    """

    gram: Tensor | None = None
    output_gram: Tensor | None = None
    cross: Tensor | None = None
    input_fisher: Tensor | None = None
    output_fisher: Tensor | None = None
    counts: Tensor | None = None
    head_gram: Tensor | None = None
    left: Tensor | None = None

    def known(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What was measured, of `names` alone if given."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        wanted = set(fields if names is None else names)
        return {name: value for name, value in fields.items() if value is not None and name in wanted}

    def of_copy(self, index: int) -> WeightStatistics:
        """Those of one of stacked weights."""
        return WeightStatistics(**{name: value[index] for name, value in self.known().items()})

    def to(self, device: torch.device) -> WeightStatistics:
        """Those on another device."""
        return WeightStatistics(**{name: value.to(device) for name, value in self.known().items()})

    def with_more(self, more: Mapping[str, Tensor]) -> WeightStatistics:
        """These and others."""
        return dataclasses.replace(self, **more)


Known = dict[str, WeightStatistics]  # by the name of the weight


def refuse_unless_finite(weight: str, *matrices: Tensor) -> None:
    """Raise LillamaError where what was summed for a weight is not finite: nothing can be factorised by it."""
    if not is_finite(*matrices):
        raise LillamaError(
            "what was summed over the activations that reach this weight is not finite: they are too large",
            where=weight,
            hint="Try run.compute: float32, look at the calibration data, or list the weight under compress.skip.",
        )


class FisherFactors(NamedTuple):
    """What sensitivity.py finds of a weight: the factors of its Fisher information, and what each component costs.

    `rounding` [1]: what it would lose in 4 bits (rounding.py), where that was asked for.
    """

    input: Tensor
    output: Tensor
    spectrum: Tensor
    rounding: Tensor | None = None


class TokenSample:
    """Up to SAMPLE of the tokens that reach a layer, for experts that saw too few of their own.

    The same ones however many processes share the batches out; `rows`: they have some rows of every batch.
    """

    def __init__(self, rows: bool = False) -> None:
        self.rows = rows
        self._parts: list[Tensor] = []
        self._kept = 0  # by all of those who share a batch

    def add(self, hidden: Tensor) -> None:
        """Take some of a batch's tokens [T, H], spread over it, so that a few batches make the sample."""
        if self._kept >= SAMPLE:
            return
        each = ranks.gather(len(hidden)) if self.rows else [len(hidden)]
        before = sum(each[: ranks.rank()]) if self.rows else 0
        step = max(sum(each) // 1024, 1)
        self._parts.append(hidden[-before % step :: step][:SAMPLE].clone())
        self._kept += -(-sum(each) // step)

    def take(self, device: torch.device) -> Tensor | None:
        """The sample [N, H], which is given away, on `device`; None where no token came. All processes call it."""
        parts, self._parts = self._parts, []
        if ranks.world() > 1:
            everyone = ranks.gather([part.cpu() for part in parts])
            in_turn = itertools.zip_longest(*everyone)  # their first, which are of one batch or of neighbours
            parts = [part.to(device) for some in in_turn for part in some if part is not None]
        return torch.cat(parts)[:SAMPLE] if parts else None
