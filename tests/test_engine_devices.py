"""What the engine does where a device works while the host goes on: losses, streams and tables, by stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lillama import Layer, Weight
from lillama.base.device import Device
from lillama.base.progress import Progress
from lillama.distill import embedding, losses
from lillama.distill.losslog import READ_EVERY, LossLog
from lillama.distill.student import Student, Training
from lillama.errors import DistillationError
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.storage import get_storage
from lillama.plan.plan import Plan
from lillama.pretrained import streams
from lillama.pretrained.walk import LayerPass, Walk
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


def test_an_original_table_waits_on_the_host_where_the_card_is_short_of_memory(monkeypatch):
    """With low memory the card has one original layer at a time: a loss on all tokens may not keep the table there."""
    monkeypatch.setattr(embedding, "row_errors", lambda *_: None)  # it reads numbers, which a stand-in has not
    with FakeTensorMode():
        table, card = nn.Embedding(30, 8, device="cuda"), Device(torch.device("cuda"), torch.float32)
        layer = Layer("embed", (Weight("embed", (30, 8), kind="embedding"),), "embedding")
        plan = Plan((layer,), {"embed": 4}, "factors", 240)
        training = Training(plan, Distill.model_validate({}), 0.1, card, 3, spare_device=True)
        small = LowRankEmbedding(get_storage("factors"), 30, 8, 4, device="cuda").requires_grad_(False)
        student = SimpleNamespace(training=training, module=small)
        loss = Student._watch_vocabulary(student, LayerPass(layer, 0, table, [], {}))
        assert loss.original.device.type == "cpu"
        more = loss.add_to(torch.ones((), device="cuda"), small, losses.mse, 5, 0)
        assert more.device.type == "cuda", "what is compared is brought over, a few rows at a time"


def test_streams_of_a_model_that_names_no_width_have_that_of_its_widest_weight():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    layers = [Layer("a", (Weight("a.w", (4, 16)),)), Layer("b", (Weight("b.w", (16, 12)),))]
    source = SimpleNamespace(config=config, working=torch.float32)
    walk = Walk(source, layers, layers, Device(torch.device("cpu"), torch.float32), Progress())
    raw = [{"input_ids": torch.zeros(2, 5, dtype=torch.int64)}]
    needed = 3 * 10 * 16 * 4  # streams, tokens, width, bytes
    assert walk.choose_place(raw, 3, (0, needed)) == "host"
    assert walk.choose_place(raw, 3, (0, needed - 1)) == "file"
