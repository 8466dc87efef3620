"""A matrix split between the processes of a serving engine, in any storage, is the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.errors import LillamaError
from lillama.lowrank.storage import get_storage
from lillama.serving.parts import TENSORS, check_shapes, padded, part_of, size_of, storage_of


def _matrix(storage: str, d_out: int, d_in: int, rank: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the matrix, the tensors that hold it), float64."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(d_out, rank, dtype=torch.float64, generator=generator)
    B = torch.randn(rank, d_in, dtype=torch.float64, generator=generator)
    return A @ B, {"weight": A @ B} if storage == "dense" else dict(get_storage(storage).encode(A, B))


def _product(part, x: torch.Tensor) -> torch.Tensor:
    """What a process makes of x: the results that its outputs are found among."""
    first = x @ part.first.T
    results = first if part.second is None else torch.cat([first, first @ part.second.T], -1)
    y = x.new_zeros(len(x), len(part.source))
    own = part.source > 0
    y[:, own] = results[:, part.source[own] - 1]
    return y


@pytest.mark.parametrize("storage", TENSORS)
@settings(max_examples=30)
@given(data=st.data())
def test_the_outputs_of_all_processes_are_those_of_the_matrix(storage, data):
    processes, share = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    d_out, d_in = processes * share, data.draw(st.integers(1, 8))
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    W, tensors = _matrix(storage, d_out, d_in, rank, data.draw(st.integers(0, 9)))
    check_shapes(tensors)
    assert storage_of(tensors) == storage and size_of(tensors) == (d_out, d_in)
    x = torch.randn(3, d_in, dtype=torch.float64)
    rows = torch.arange(1, d_out + 1).chunk(processes)
    found = [_product(part_of(tensors, own, None), x) for own in rows]
    torch.testing.assert_close(torch.cat(found, -1), x @ W.T)


@pytest.mark.parametrize("storage", TENSORS)
def test_the_columns_of_all_processes_add_up_to_the_matrix(storage):
    W, tensors = _matrix(storage, 10, 12, 4, 0)
    x = torch.randn(3, 12, dtype=torch.float64)
    rows = torch.arange(1, 11)
    halves = [torch.arange(0, 6), torch.arange(6, 12)]
    y = sum(_product(part_of(tensors, rows, own), x[:, own]) for own in halves)
    torch.testing.assert_close(y, x @ W.T)


@pytest.mark.parametrize("storage", TENSORS)
def test_outputs_of_other_parts_are_left_alone_and_padding_is_zero(storage):
    W, tensors = _matrix(storage, 6, 5, 3, 0)
    x = torch.randn(2, 5, dtype=torch.float64)
    rows = torch.tensor([0, 0, 6, 1, 2, 0])
    part = part_of(tensors, rows, None)
    assert part.source.bool().tolist() == [False, False, True, True, True, False]
    torch.testing.assert_close(_product(part, x)[:, 2:5], x @ W[[5, 0, 1]].T)
    whole = padded(part)
    assert (whole.source > 0).all()
    torch.testing.assert_close(_product(whole, x), _product(part, x))


@pytest.mark.parametrize(
    "storage, change, said",
    [
        ("factors", lambda t: t.update(A=t["A"][:, :2]), "do not go together"),
        ("pivoted", lambda t: t.update(pivots=t["pivots"][:2]), "do not go together"),
        ("pivoted", lambda t: t["pivots"].__setitem__(0, t["pivots"][1]), "not 3 different rows of 6"),
        ("pivoted", lambda t: t["pivots"].__setitem__(0, 6), "not 3 different rows of 6"),
        ("factors", lambda t: t.update(B=t["B"][None]), "no tensors of a matrix kept as factors"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(storage, change, said):
    _, tensors = _matrix(storage, 6, 5, 3, 0)
    change(tensors)
    with pytest.raises(LillamaError, match=said):
        check_shapes(tensors)
