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

DENSE = "dense"
# The storages that can be served, and the tensors of each: all are needed.
TENSORS: dict[str, tuple[str, ...]] = {DENSE: ("weight",), "factors": ("A", "B"), "pivoted": ("B", "C", "pivots")}
SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in TENSORS.values() for suffix in suffixes))


class Part(NamedTuple):
    """One matrix in one process: y = cat(first x, second[..] first x)[source - 1] where `source` is not 0."""

    first: Tensor
    """The rows of the first product (k x columns): B, or all of a dense matrix."""
    second: Tensor | None
    """The rows of the second one (m x k), if there is one."""
    source: Tensor
    """For each output of the layer (outputs) 1 + its place among the k + m results; 0 where it is another part's."""


def storage_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The storage whose tensors these are; None unless they are all there."""
    return next((name for name, suffixes in TENSORS.items() if set(suffixes) == set(tensors)), None)


def size_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that complete tensors hold."""
    if "weight" in tensors:
        d_out, d_in = tensors["weight"].shape
        return d_out, d_in
    rank, d_in = tensors["B"].shape
    return (len(tensors["A"]) if "A" in tensors else len(tensors["C"]) + rank), d_in


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """LillamaError unless complete tensors go together."""
    storage = storage_of(tensors)
    given = {suffix: list(tensor.shape) for suffix, tensor in tensors.items()}
    if any(tensor.dim() != (1 if suffix == "pivots" else 2) for suffix, tensor in tensors.items()):
        raise LillamaError(f"{given} are no tensors of a matrix kept as {storage}")
    if storage == DENSE:
        return
    d_out, rank = size_of(tensors)[0], len(tensors["B"])
    inner = tensors["A" if storage == "factors" else "C"].shape[1]
    pivots = tensors.get("pivots", torch.arange(rank))
    if inner != rank or len(pivots) != rank:
        raise LillamaError(f"{given} do not go together")
    if len(pivots.unique()) != rank or bool((pivots < 0).any()) or bool((pivots >= d_out).any()):
        raise LillamaError(f"the pivots are not {rank} different rows of {d_out}")


def part_of(tensors: Mapping[str, Tensor], rows: Tensor, columns: Tensor | None) -> Part:
    """A matrix in the process that has `columns` of its inputs (None: all), and whose outputs are `rows`.

    `rows` (outputs): for each output of the layer 1 + the row of the matrix, 0 where the output is not this matrix's.
    """
    own = rows.nonzero().flatten()
    wanted, source = rows[own] - 1, torch.zeros_like(rows)
    if "weight" in tensors:
        source[own] = torch.arange(1, len(own) + 1)
        return Part(_columns(tensors["weight"][wanted], columns), None, source)
    B = _columns(tensors["B"], columns)
    rank = len(B)
    if "A" in tensors:
        source[own] = torch.arange(1, len(own) + 1) + rank
        return Part(B, tensors["A"][wanted], source)
    place = pivoted_places(tensors["pivots"], size_of(tensors)[0])[wanted]
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
    longer = torch.cat([last, last.new_zeros(len(free), last.shape[1])])
    return Part(longer, None, source) if part.second is None else Part(part.first, longer, source)


def pivoted_places(pivots: Tensor, d_out: int) -> Tensor:
    """Where the rows of a pivoted matrix are among its pivot rows and, behind these, the others in rising order."""
    pivots, rank = pivots.cpu(), len(pivots)
    is_pivot = torch.zeros(d_out, dtype=torch.bool).index_fill(0, pivots, True)
    places = torch.empty(d_out, dtype=torch.long)
    places[pivots] = torch.arange(rank)
    places[~is_pivot] = torch.arange(rank, d_out)
    return places


def _columns(matrix: Tensor, columns: Tensor | None) -> Tensor:
    return matrix if columns is None else matrix[:, columns]
