"""Matrices of a checkpoint as a serving engine's process holds them: the rows and columns that are its own.

An engine merges the weights that share an input into one layer, and splits layers between processes: by output rows or
by input columns, never by rank. Whatever the storage, a matrix becomes a `Part`: the rows of a first product, those of
a second one, and for every output of the layer where it is found among the results of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lillama.errors import LillamaError
from lillama.lowrank.rounded import CODES, SCALE, read_name
from lillama.lowrank.whole import NAME as DENSE
from lillama.serving.pieces import Matrix, Piece, longer, of_columns

PIVOTS = "pivots"
_BASES: dict[str, tuple[str, ...]] = {"factors": ("A", "B"), "pivoted": ("B", "C", PIVOTS)}


def _in_few_bits(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(kept for one in suffixes for kept in ([one] if one == PIVOTS else [one + CODES, one + SCALE]))


# The storages that can be served, and the tensors of each: all are needed. Those in few bits end with a colon.
TENSORS: dict[str, tuple[str, ...]] = {
    DENSE: ("weight",),
    **_BASES,
    **{f"{name}:": _in_few_bits(suffixes) for name, suffixes in {DENSE: ("W",), **_BASES}.items()},
}
SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in TENSORS.values() for suffix in suffixes))


def check_storage(name: str) -> None:
    """LillamaError for a storage that no layer takes: a plugin's own, or bits and groups that are none."""
    parts = read_name(name)
    known = name in _BASES if parts is None else f"{parts[0]}:" in TENSORS
    if not known:
        raise LillamaError(
            f"the storage '{name}' cannot be served: {', '.join(sorted(_BASES))} can, in full or few bits",
            hint="`lillama export DIR OUT --dense` writes a model that any engine serves.",
        )


def type_of(suffix: str, dtype: torch.dtype) -> torch.dtype:
    """The type of what stands for a tensor that has not come, where numbers in full are of `dtype`."""
    if suffix.endswith((CODES, SCALE)):
        return torch.int8 if suffix.endswith(CODES) else torch.bfloat16
    return torch.long if suffix == PIVOTS else dtype


class Part(NamedTuple):
    """One matrix in one process: y = cat(first x, second[..] first x)[source - 1] where `source` is not 0."""

    first: Matrix
    """The rows of the first product (k x columns): B, or all of a dense matrix."""
    second: Matrix | None
    """The rows of the second one (m x k), if there is one."""
    source: Tensor
    """For each output of the layer (outputs) 1 + its place among the k + m results; 0 where it is another part's."""


def storage_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The storage whose tensors these are; None unless they are all there."""
    return next((name for name, suffixes in TENSORS.items() if set(suffixes) == set(tensors)), None)


def matrices_of(tensors: Mapping[str, Tensor]) -> dict[str, Matrix]:
    """Complete tensors with a `Piece` in place of codes and scales; a dense matrix is `weight` in either case.

    Raises LillamaError for codes and scales that do not go together.
    """
    found: dict[str, Matrix] = {}
    for suffix, tensor in tensors.items():
        base = suffix.removesuffix(CODES)
        if base != suffix:
            found["weight" if base == "W" else base] = Piece.of(tensor, tensors[base + SCALE])
        elif not suffix.endswith(SCALE):
            found[suffix] = tensor
    return found


def size_of(tensors: Mapping[str, Matrix]) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that `matrices_of` made of complete tensors."""
    if "weight" in tensors:
        d_out, d_in = tensors["weight"].shape
        return d_out, d_in
    rank, d_in = tensors["B"].shape
    return (len(tensors["A"]) if "A" in tensors else len(tensors["C"]) + rank), d_in


def check_shapes(tensors: Mapping[str, Matrix]) -> None:
    """LillamaError unless what `matrices_of` made of complete tensors goes together."""
    given = {suffix: list(tensor.shape) for suffix, tensor in tensors.items()}
    if any(len(shape) != (1 if suffix == PIVOTS else 2) for suffix, shape in given.items()):
        raise LillamaError(f"{given} are no tensors of a matrix")
    if "weight" in tensors:
        return
    d_out, rank = size_of(tensors)[0], len(tensors["B"])
    inner = tensors["A" if "A" in tensors else "C"].shape[1]
    pivots = tensors.get(PIVOTS, torch.arange(rank))
    assert isinstance(pivots, Tensor)
    if inner != rank or len(pivots) != rank:
        raise LillamaError(f"{given} do not go together")
    if len(pivots.unique()) != rank or bool((pivots < 0).any()) or bool((pivots >= d_out).any()):
        raise LillamaError(f"the pivots are not {rank} different rows of {d_out}")


def part_of(tensors: Mapping[str, Matrix], rows: Tensor, columns: Tensor | None) -> Part:
    """A matrix in the process that has `columns` of its inputs (None: all), and whose outputs are `rows`.

    `rows` (outputs): for each output of the layer 1 + the row of the matrix, 0 where the output is not this matrix's.
    """
    own = rows.nonzero().flatten()
    wanted, source = rows[own] - 1, torch.zeros_like(rows)
    if "weight" in tensors:
        source[own] = torch.arange(1, len(own) + 1)
        return Part(of_columns(tensors["weight"][wanted], columns), None, source)
    B = of_columns(tensors["B"], columns)
    rank = len(B)
    if "A" in tensors:
        source[own] = torch.arange(1, len(own) + 1) + rank
        return Part(B, tensors["A"][wanted], source)
    pivots = tensors[PIVOTS]
    assert isinstance(pivots, Tensor)
    place = pivoted_places(pivots, size_of(tensors)[0])[wanted]
    others = place >= rank
    source[own[~others]] = place[~others] + 1
    source[own[others]] = torch.arange(1, int(others.sum()) + 1) + rank
    return Part(B, tensors["C"][place[others] - rank], source)


def padded(part: Part) -> Part:
    """The same matrix with a row of zeros for every output that is no part's."""
    free = (part.source == 0).nonzero().flatten()
    last = part.first if part.second is None else part.second
    source = part.source.clone()
    source[free] = torch.arange(1, len(free) + 1) + len(part.first) + (0 if part.second is None else len(part.second))
    more = longer(last, len(free))
    return Part(more, None, source) if part.second is None else Part(part.first, more, source)


def pivoted_places(pivots: Tensor, d_out: int) -> Tensor:
    """Where the rows of a pivoted matrix are among its pivot rows and, behind these, the others in rising order."""
    pivots, rank = pivots.cpu(), len(pivots)
    is_pivot = torch.zeros(d_out, dtype=torch.bool).index_fill(0, pivots, True)
    places = torch.empty(d_out, dtype=torch.long)
    places[pivots] = torch.arange(rank)
    places[~is_pivot] = torch.arange(rank, d_out)
    return places
