"""The bytes that a whole result may take, and how each of its weights may be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lillama.contract import Weight
from lillama.lowrank.counts import held_bytes, index_bytes
from lillama.lowrank.rounded import read_name
from lillama.lowrank.storage import get_storage, rounded
from lillama.lowrank.whole import NAME as DENSE


@dataclass(frozen=True)
class Budget:
    """Bytes, and the names of storages (`lowrank/storage.py`) that they may be spent on.

    `before` are those of the original with `each` for a number, `most` those that the result may take, `outside` those
    of all parameters that are of no weight in the plan. `dense` and `ranked` name, for every weight, the storages that
    it may end in when it is dense or of low rank: `dense:4:32`, `pivoted:8:32`; `dense` alone, and a format without
    bits, are in full. `twice` are the weights that another one is tied to.
    """

    before: int
    most: int
    each: int
    outside: int
    dense: Mapping[str, tuple[str, ...]]
    ranked: Mapping[str, tuple[str, ...]]
    twice: frozenset[str] = frozenset()

    def bytes(self, weight: Weight, rank: int | None, form: str) -> int:
        """What a weight takes in a checkpoint, with the row numbers of what is tied to it."""
        held = held_bytes(weight, rank, form, self.each)
        if rank is not None and weight.name in self.twice:
            held += index_bytes(get_storage(form), weight.shape, rank)
        return held


@dataclass(frozen=True)
class Narrowing:
    """An MLP with so many of its neurons left, and the spectra of its weights then, by name.

    `loss` is what the neurons that are gone cost, in nats per token, once the others make up for them.
    """

    left: int
    loss: float
    spectra: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """What is known of every weight before ranks are chosen, by name, for one copy or the sum of all.

    `spectra`: what each component costs (twice, in nats per token); `rounding`: what the dense weight loses in 4 bits,
    in nats per token, where that was asked for (factorise/rounding.py); `narrowings`: of an MLP, by its exit, what is
    to be had where neurons may be removed, all of them left first.
    """

    spectra: Mapping[str, Sequence[float]]
    rounding: Mapping[str, float] = field(default_factory=dict)
    narrowings: Mapping[str, Sequence[Narrowing]] = field(default_factory=dict)


def is_even(weight: Weight, rank: int | None, form: str) -> bool:
    """Whether few bits of this weight fill whole bytes; in full, always."""
    if (parts := read_name(form)) is None:
        return True
    return rounded(*parts).is_even(*weight.shape, rank or min(weight.shape))


def bits_of(form: str) -> int | None:
    """Bits of a number in a storage; None in full."""
    parts = read_name(form)
    return parts[1] if parts else None


def dense_form(weight: Weight, form: str) -> str:
    """The storage of a weight that is dense after all, in as many bits as `form` has."""
    parts = read_name(form)
    dense = DENSE if parts is None else rounded(DENSE, *parts[1:]).name
    return dense if is_even(weight, None, dense) else DENSE
