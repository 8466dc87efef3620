"""Calculations side by side, and what free memory is looked for in."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from lillama.base import memory
from lillama.base.threads import SMALL, side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_tasks_run_at_once_each_on_one_thread_and_their_results_are_in_order():
    both = threading.Barrier(2, timeout=30)  # broken unless two tasks are in there at once

    def calculate(number: int) -> tuple[int, int, bool]:
        both.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    assert side_by_side(calculate, [3, 1, 2, 0], CPU, rows=8) == [(n, 1, False) for n in (3, 1, 2, 0)]
    assert torch.get_num_threads() == 2


def test_large_matrices_have_all_threads_one_after_another():
    seen = side_by_side(lambda _: (torch.get_num_threads(), threading.current_thread()), [0, 1], CPU, rows=SMALL + 1)
    assert seen == [(2, threading.main_thread())] * 2


def test_an_error_in_a_task_comes_out_and_the_threads_are_as_they_were():
    with pytest.raises(torch.linalg.LinAlgError):
        side_by_side(torch.linalg.cholesky, [torch.eye(2), -torch.eye(2)], CPU, rows=2)
    assert torch.get_num_threads() == 2


def test_no_tasks_are_no_results():
    assert side_by_side(torch.linalg.inv, [], CPU, rows=0) == []


class Ring:
    """What only points at itself."""

    def __init__(self) -> None:
        self.me = self


def test_what_was_there_is_spared_and_what_is_made_meanwhile_goes():
    old = weakref.ref(Ring())
    with memory.settled():
        assert old() is None  # it went before
        assert gc.get_freeze_count() > 0
        new = weakref.ref(Ring())
        memory.give_back()
        assert new() is None
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with memory.settled():
            assert gc.get_freeze_count() == frozen
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
