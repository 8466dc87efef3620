"""Losses are read seldom where reading waits for a device, and a bad one is found before anything is stored."""

from __future__ import annotations

import pytest
import torch

from lillama.distill.losslog import READ_EVERY, LossLog
from lillama.errors import DistillationError
from lillama.pretrained import streams
from lillama.recipe.schema import Distill

NAN = float("nan")


class Counting(torch.Tensor):
    """A tensor that counts how often numbers are read from it, as a GPU's would be waited for."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__):
            Counting.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def log(device: str) -> LossLog:
    Counting.reads = 0
    return LossLog("model.layers.3", Distill.model_validate({}), torch.device(device))


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value).as_subclass(Counting)


def test_a_gpu_is_waited_for_once_in_many_steps():
    kept = log("cuda")
    for step in range(1, 3 * READ_EVERY + 1):
        kept.add(step, loss(0.5))
    kept.read()
    assert Counting.reads == 3


def test_on_a_cpu_a_bad_loss_stops_its_own_step():
    kept = log("cpu")
    kept.add(1, loss(0.5))
    with pytest.raises(DistillationError, match=r"model\.layers\.3: the loss became nan at step 2"):
        kept.add(2, loss(NAN))


def test_elsewhere_the_first_bad_step_is_named_when_losses_are_read():
    kept = log("cuda:1")
    for step, value in enumerate([0.5, NAN, float("inf"), NAN], 1):
        kept.add(step, loss(value))
    with pytest.raises(DistillationError, match="became nan at step 2"):
        kept.read()
    kept.read()  # said once


def test_streams_of_a_gpu_wait_in_pinned_memory(monkeypatch):
    asked = []
    empty_like = torch.empty_like

    def pinned(tensor, *, device, pin_memory):
        asked.append((device, pin_memory))
        return empty_like(tensor, device="cpu")

    class OnCard:
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch, "empty_like", pinned)
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, non_blocking=False: (asked.append(non_blocking), self)[1]
    )
    monkeypatch.setattr(streams.torch, "empty_like", lambda tensor, **how: pinned(torch.zeros(2), **how))
    streams.to_host(OnCard())
    assert asked == [("cpu", True), True]
    plain = torch.ones(3)
    assert streams.to_host(plain).data_ptr() == plain.data_ptr(), "on a CPU nothing is copied"
