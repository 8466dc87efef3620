"""A head that learns a few positions at a time has the loss and the gradient of all at once."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from torch import nn

from lillama.distill.heads import head_distances
from lillama.distill.losses import l1_logcos, mse, token_mean
from lillama.pretrained import predictions
from lillama.pretrained.calls import Capture
from lillama.pretrained.walk import HeadTarget, Originals
from lillama.run import pipeline
from lillama.testing import recipe_for, token_batches

WORDS = 97
MASK = torch.ones(2, 11, dtype=torch.int64)
MASK[1, 2:] = 0


class Here:
    """What of a walk a target needs."""

    def __init__(self) -> None:
        self.originals = Originals()
        self.device = type("Device", (), {"autocast": staticmethod(lambda: torch.autocast("cpu", enabled=False))})


def call_of(masked: bool):
    from lillama.contract import Layer

    model = tiny()
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids} | ({"attention_mask": MASK} if masked else {})
    batch, hidden = Capture(model, [Layer("lm_head", kind="head")], torch.device("cpu"))(given)
    return batch.calls[0], hidden.detach()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", [l1_logcos, mse])
def test_loss_and_gradient_are_those_of_the_whole_batch(masked, objective, monkeypatch):
    monkeypatch.setattr(predictions, "READ", 2 * 3 * WORDS)
    call, hidden = call_of(masked)
    torch.manual_seed(1)
    teacher, student = nn.Linear(32, WORDS), nn.Linear(32, WORDS)
    streams = {"teacher": hidden, "student": hidden + 0.1}
    made: list[int] = []
    for one in (teacher, student):
        one.register_forward_hook(lambda _, args, out: made.append(out.shape[1]))
    target = HeadTarget(call, teacher, hidden, Here(), "lm_head", 0)
    found = head_distances(student, streams, target, objective)
    loss = found["teacher"] * found["student"]  # a loss need not be a sum
    (loss * 2).backward()
    some = [parameter.grad.clone() for parameter in student.parameters()]
    assert set(made) == {2, 3}, "no more logits than allowed were made"
    student.zero_grad()
    with torch.no_grad():
        wanted = teacher(hidden)
        again = head_distances(student, streams, target, objective)
    whole = [token_mean(objective(student(x), wanted), MASK if masked else None) for x in streams.values()]
    (whole[0] * whole[1] * 2).backward()
    torch.testing.assert_close([*found.values()], whole)
    torch.testing.assert_close([*again.values()], whole)
    torch.testing.assert_close(some, [parameter.grad for parameter in student.parameters()], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("name", ["llama", "llama-bias"])  # tied, untied
def test_a_run_learns_the_same_with_few_logits_at_a_time(name, schedule, tmp_path, monkeypatch):
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    learned = []
    for at_once in (5, 1000):
        monkeypatch.setattr(predictions, "READ", 2 * at_once * WORDS)
        changes = {"compress.reduction": 0.5, "distill.epochs": 2, "distill.schedule": schedule}
        recipe = recipe_for(tmp_path / "model", tmp_path / str(at_once), "inkuba", changes)
        result = pipeline.compress(recipe, batches=token_batches(model, batches=5))
        learned.append(prepared_tensors(result.path))
    assert learned[0].keys() == learned[1].keys()
    for key, tensor in learned[1].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(learned[0][key], tensor, rtol=1e-3, atol=2e-5)


def prepared_tensors(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_an_original_head_that_is_not_finite_is_named(tmp_path):
    from lillama.errors import LillamaError

    call, hidden = call_of(False)
    teacher = nn.Linear(32, WORDS)
    nn.init.constant_(teacher.bias, float("nan"))
    target = HeadTarget(call, teacher, hidden, Here(), "lm_head", 3)
    with pytest.raises(LillamaError, match=r"lm_head.*batch 4"):
        target.of(range(4, 7))
