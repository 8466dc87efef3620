"""A model that is divided among processes: what each keeps, and how the whole comes back."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from lillama.finetune import divided
from lillama.recipe.schema import Recipe
from lillama.run.learn import divides

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import families

HOST = torch.device("cpu")
SECTIONS = {"model": {"id": "m"}, "compress": {"reduction": 0.2}, "distill": {}, "calibration": {"dataset": "d"}}


@pytest.fixture
def group():
    """One process that could be one of several."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def tied():
    model = families.MODELS["llama"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def test_a_divided_model_is_the_same_map_and_the_original_stays_as_it_is(group):
    model = tied()
    blocks = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    part = divided.divide(model, blocks, HOST)
    inside = [name for name, parameter in part.named_parameters() if isinstance(parameter, DTensor)]
    assert inside and all(name.startswith("model.layers.") for name in inside)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert part.lm_head.weight is part.model.embed_tokens.weight and not part.lm_head.weight.requires_grad
    ids = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(part(ids).logits, model(ids).logits)
    part(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    for (name, own), other in zip(part.named_parameters(), model.parameters()):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(divided.whole_of(own.grad), other.grad)


def test_what_a_divided_model_learned_comes_back(group):
    model = tied()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    part = divided.divide(model, ["model.layers.0"], HOST)
    for parameter in part.parameters():
        divided.put(parameter, torch.full(parameter.shape, 3.0))
    learned = divided.whole_learned(part)
    assert learned.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    divided.gather(part, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 3.0) if parameter.requires_grad else before[name])


def test_columns_that_are_next_to_each_other_are_divided_too(group):
    root = nn.Sequential(nn.Linear(4, 6, bias=False))
    root[0].weight = nn.Parameter(torch.arange(24.0).view(4, 6).T)
    part = divided.divide(root, ["0"], HOST)
    assert torch.equal(divided.whole_of(part[0].weight), root[0].weight)


def test_an_optimiser_goes_on_from_the_state_of_all(group):
    def learn(optimizer, model):
        ids = torch.arange(12).view(1, 12)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tied()
    first = divided.divide(model, ["model.layers.0"], HOST)
    optimizer = torch.optim.AdamW([p for p in first.parameters() if p.requires_grad], foreach=False)
    learn(optimizer, first)
    # As if they were read from a file: of one process the whole may be what it keeps.
    learned, state = copy.deepcopy((divided.whole_learned(first), divided.whole_state(optimizer)))
    held = [value for one in state["state"].values() for value in one.values()]
    assert held and not any(isinstance(value, DTensor) for value in held)

    second = divided.divide(model, ["model.layers.0"], HOST)
    for name, parameter in second.named_parameters():
        if parameter.requires_grad:
            divided.put(parameter, learned[name])
    resumed = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], foreach=False)
    resumed.register_load_state_dict_pre_hook(divided.divide_state)
    resumed.load_state_dict(state)
    for one, other in ((optimizer, first), (resumed, second)):
        learn(one, other)
    for own, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(divided.whole_of(own), divided.whole_of(other))


@pytest.mark.parametrize(
    ("asked", "told", "world", "expected"),
    [
        (None, True, 2, True),
        (None, False, 2, False),
        (True, False, 2, True),
        (False, True, 2, False),
        (True, True, 1, False),
    ],
)
def test_a_recipe_or_the_launcher_asks_for_it(monkeypatch, asked, told, world, expected):
    from lillama.base import ranks

    monkeypatch.setattr(ranks._group, "divide", told)
    monkeypatch.setattr(ranks._group, "world", world)
    recipe = Recipe.parse({**SECTIONS, "run": {"out": "r", "divide": asked}})
    assert divides(recipe) is expected
