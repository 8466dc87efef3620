"""A matrix split between the processes of a serving engine, in any storage, is the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.errors import LillamaError
from lillama.lowrank.storage import get_storage
from lillama.serving.parts import check_shapes, matrices_of, padded, part_of, size_of, storage_of
from lillama.serving.pieces import whole

STORAGES = ["dense", "factors", "pivoted", "dense:4:32", "dense:8:64", "factors:4:64", "pivoted:4:32", "pivoted:8:32"]


def _tensors(storage: str, d_out: int, d_in: int, rank: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the matrix, the tensors that hold it), float64."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(d_out, rank, dtype=torch.float64, generator=generator)
    B = torch.randn(rank, d_in, dtype=torch.float64, generator=generator)
    if storage == "dense":
        return A @ B, {"weight": A @ B}
    kept = get_storage(storage)
    tensors = {suffix: t.double() if t.is_floating_point() else t for suffix, t in kept.encode(A, B).items()}
    return kept.product(tensors, kept.derive(tensors)), tensors


def _matrix(storage: str, d_out: int, d_in: int, rank: int, seed: int):
    """(the matrix, what a receiver makes of the tensors that hold it), float64."""
    W, tensors = _tensors(storage, d_out, d_in, rank, seed)
    assert storage_of(tensors) == (storage[: storage.index(":") + 1] if ":" in storage else storage)
    matrices = matrices_of(tensors)
    check_shapes(matrices)
    assert size_of(matrices) == (d_out, d_in)
    return W, matrices


def _product(part, x: torch.Tensor) -> torch.Tensor:
    """What a process makes of x: the results that its outputs are found among."""
    first = x @ whole(part.first, x.dtype).T
    results = first if part.second is None else torch.cat([first, first @ whole(part.second, x.dtype).T], -1)
    y = x.new_zeros(len(x), len(part.source))
    own = part.source > 0
    y[:, own] = results[:, part.source[own] - 1]
    return y


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=30)
@given(data=st.data())
def test_the_outputs_of_all_processes_are_those_of_the_matrix(storage, data):
    processes, share = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    even = 2 if ":4:" in storage else 1  # codes that a byte holds
    d_out, d_in = even * processes * share, even * data.draw(st.integers(1, 40 if ":" in storage else 8))
    rank = even * data.draw(st.integers(1, min(d_out, d_in) // even))
    W, matrices = _matrix(storage, d_out, d_in, rank, data.draw(st.integers(0, 9)))
    x = torch.randn(3, d_in, dtype=torch.float64)
    rows = torch.arange(1, d_out + 1).chunk(processes)
    found = [_product(part_of(matrices, own, None), x) for own in rows]
    torch.testing.assert_close(torch.cat(found, -1), x @ W.T)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cut", [64, 96, 37, 1])  # between groups of 32, of 64, inside a group, inside a byte
def test_the_columns_of_all_processes_add_up_to_the_matrix(storage, cut):
    W, matrices = _matrix(storage, 10, 150, 4, 0)
    x = torch.randn(3, 150, dtype=torch.float64)
    rows = torch.arange(1, 11)
    shares = [torch.arange(0, cut), torch.arange(cut, 150)]
    y = sum(_product(part_of(matrices, rows, own), x[:, own]) for own in shares)
    torch.testing.assert_close(y, x @ W.T)


@pytest.mark.parametrize("storage", STORAGES)
def test_outputs_of_other_parts_are_left_alone_and_padding_is_zero(storage):
    W, matrices = _matrix(storage, 6, 8, 4, 0)
    x = torch.randn(2, 8, dtype=torch.float64)
    rows = torch.tensor([0, 0, 6, 1, 2, 0])
    part = part_of(matrices, rows, None)
    assert part.source.bool().tolist() == [False, False, True, True, True, False]
    torch.testing.assert_close(_product(part, x)[:, 2:5], x @ W[[5, 0, 1]].T)
    longer = padded(part)
    assert (longer.source > 0).all()
    torch.testing.assert_close(_product(longer, x), _product(part, x))


@pytest.mark.parametrize(
    "storage, change, said",
    [
        ("factors", lambda t: t.update(A=t["A"][:, :2]), "do not go together"),
        ("pivoted", lambda t: t.update(pivots=t["pivots"][:2]), "do not go together"),
        ("pivoted", lambda t: t["pivots"].__setitem__(0, t["pivots"][1]), "not 3 different rows of 6"),
        ("pivoted", lambda t: t["pivots"].__setitem__(0, 6), "not 3 different rows of 6"),
        ("factors", lambda t: t.update(B=t["B"][None]), "no tensors of a matrix"),
        ("dense:4:32", lambda t: t.update(W_scale=t["W_scale"].repeat(1, 2)), "do not go together"),
        ("factors:8:32", lambda t: t.update(A_codes=t["A_codes"][1:]), "do not go together"),
        ("pivoted:8:32", lambda t: t.update(C_codes=t["C_codes"].float()), "no matrix in few bits"),
        ("factors:8:32", lambda t: t.update(B_scale=t["B_scale"][:2], B_codes=t["B_codes"][:2]), "do not go together"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(storage, change, said):
    _, tensors = _tensors(storage, 6, 70 if ":" in storage else 5, 3, 0)
    change(tensors)
    with pytest.raises(LillamaError, match=said):
        check_shapes(matrices_of(tensors))
