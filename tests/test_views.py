"""The factors of a linear seen as `nn.Linear` children: nothing is found twice, and no tool is silently ignored."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from test_compile import IDS, compressed
from torch import nn
from torch.nn import functional as F

from lillama.contract import Layer
from lillama.dense.plain import is_linear
from lillama.errors import LillamaError
from lillama.evaluate.stable_rank import _weights
from lillama.finetune import adapters
from lillama.lowrank import swap
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.storage import get_storage
from lillama.lowrank.views import FactorView
from lillama.recipe.schema import Lora

STORAGES = {"factors": "AB", "pivoted": "BC"}
X = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))


def linear(storage: str, rank: int = 4, bias: bool = True) -> LowRankLinear:
    torch.manual_seed(0)
    module = LowRankLinear(get_storage(storage), 12, 20, rank, bias)
    module.set_factors(torch.randn(20, rank), torch.randn(rank, 12))
    if bias:
        nn.init.normal_(module.bias)
    return module


def follows(module: LowRankLinear) -> bool:
    """Whether every view shows the parameter that its module has now."""
    names = module.storage.parameters
    return all(getattr(module, f"linear_{name}").weight is getattr(module, name) for name in names)


@pytest.mark.parametrize("storage", STORAGES)
def test_views_show_the_factors_and_are_counted_nowhere(storage: str) -> None:
    module = linear(storage)
    views = {name: view for name, view in module.named_modules() if name}
    assert list(views) == [f"linear_{name}" for name in STORAGES[storage]]
    for name, view in views.items():
        factor = getattr(module, name[-1])
        assert isinstance(view, nn.Linear) and view.weight is factor
        assert (view.out_features, view.in_features) == tuple(factor.shape)
        x = torch.ones(1, view.in_features)
        torch.testing.assert_close(view(x), F.linear(x, factor))
        assert not list(view.parameters()) and not view.state_dict()
        assert not is_linear(view), "it is no weight of its own"
    wanted = {*STORAGES[storage], "bias"}
    assert set(dict(module.named_parameters(remove_duplicate=False))) == wanted
    assert set(module.state_dict()) - {"pivots"} == wanted


@pytest.mark.parametrize("storage", STORAGES)
def test_views_follow_whatever_becomes_of_the_factors(storage: str) -> None:
    module = linear(storage)
    y = module(X).detach()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.in_storage(module.storage)):
        assert follows(other) and other.storage.name == storage
        assert getattr(other, STORAGES[storage][0]) is not getattr(module, STORAGES[storage][0])
        torch.testing.assert_close(other(X), y, rtol=1e-4, atol=1e-4)
    for other in STORAGES:
        changed = module.in_storage(get_storage(other))
        assert follows(changed) and [name[-1] for name, _ in changed.named_children()] == list(STORAGES[other])
    assert follows(copy.deepcopy(module).half()) and follows(copy.deepcopy(module).to("meta"))
    assigned = LowRankLinear(get_storage(storage), 12, 20, 4, True, device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert follows(assigned) and torch.equal(assigned(X), y)
    module.linear_B.weight = nn.Parameter(torch.zeros_like(module.B))
    assert follows(module) and torch.equal(module(X)[0], module.bias)


def test_a_tied_head_shows_the_embedding_s_factors_and_empty_ones_have_no_view() -> None:
    model = compressed("factors")
    assert model.lm_head.linear_A.weight is model.model.embed_tokens.A
    assert not list(model.model.embed_tokens.children()), "a table looks rows up"
    full = linear("pivoted", rank=12)
    assert [name for name, _ in full.named_children()] == ["linear_B", "linear_C"]
    square = LowRankLinear(get_storage("pivoted"), 12, 12, 12)  # every row is a pivot row
    assert [name for name, _ in square.named_children()] == ["linear_B"]
    few = LowRankLinear(get_storage("pivoted:8:32"), 64, 96, 32)
    assert not list(few.children()), "a scale is no factor, and codes are in few bits already"


def test_numbers_go_as_soon_as_a_module_goes() -> None:
    gc.disable()
    try:
        module = linear("factors")
        gone = weakref.ref(module.A)
        del module
        assert gone() is None, "a circle of references keeps memory until it is looked for"
    finally:
        gc.enable()


@pytest.mark.parametrize("storage", STORAGES)
def test_what_stands_in_the_place_of_a_view_is_called(storage: str) -> None:
    module = linear(storage)
    expected = module(X).detach()

    class Doubled(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inside(x)

    module.linear_B = Doubled(module.linear_B)
    torch.testing.assert_close(module(X), 2 * (expected - module.bias) + module.bias, rtol=1e-4, atol=1e-4)
    traced = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(X), module(X))
    torch._dynamo.reset()
    module.linear_B = module.linear_B.inside
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_view_that_is_watched_or_changed_is_called(storage: str) -> None:
    module, seen = linear(storage), []
    expected = module(X).detach()
    for name in STORAGES[storage]:
        module.get_submodule(f"linear_{name}").register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    torch.testing.assert_close(module(X), expected)
    assert seen == [(9, 4), (9, 20 if storage == "factors" else 16)]
    module = linear(storage)
    module.linear_B.bias = nn.Parameter(torch.ones(4))
    assert not torch.equal(module(X), expected)
    module = linear(storage)
    module.linear_B.forward = lambda x: torch.zeros(*x.shape[:-1], 4)
    assert torch.equal(module(X), module.bias.expand(9, 20))


def test_what_cannot_be_done_to_a_view_says_so() -> None:
    module = linear("factors")
    with pytest.raises(LillamaError, match=r"linear_A: a factor is an nn\.Parameter, not Tensor"):
        module.linear_A.weight = torch.zeros(20, 4)
    with pytest.raises(LillamaError, match="linear_B: the weight of a view is a factor"):
        del module.linear_B.weight

    class Negated(type(get_storage("factors"))):  # type: ignore[misc]  # multiplies by what it makes of a tensor
        def multiply(self, x: Any, tensors: Any, derived: Any, products: Any = None, bias: Any = None) -> Any:
            return products.linear(products.linear(x, -tensors["B"]), -tensors["A"], bias)

    module.matrix.storage = Negated()
    module.linear_A = nn.Linear(4, 20)
    with pytest.raises(LillamaError, match="cannot call what was put in the place of linear_A"):
        module(X)


def test_our_own_tools_take_no_view_for_a_weight() -> None:
    model = compressed("factors")
    layer = model.model.layers[0]
    kinds = [row["kind"] for row in _weights(0, layer)]
    assert len(kinds) == 7 and not any("linear_" in kind for kind in kinds)
    parameters, dense = adapters.targets(model, "all")
    assert len(parameters) == 8 and len(dense) == 3 and not any("linear_" in name for name in dense)
    found = Layer.of_linears(model, "model.layers.0", (("self_attn.k_proj",), ("self_attn.v_proj",)))
    assert [weight.name.rpartition(".")[2] for weight in found.weights] == ["k_proj", "v_proj"]
    assert "LowRankLinear" in model._no_split_modules, "or a head's factors may be put on two devices"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FactorView):
            model._initialize_weights(module)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("storage", STORAGES)
def test_peft_adapts_all_linears(storage: str) -> None:
    peft = pytest.importorskip("peft")
    model = compressed(storage)
    with torch.no_grad():
        names, expected = list(model.state_dict()), model(input_ids=IDS).logits
    settings: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": r".*lm_head.*"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    learning = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(learning) == 2 * (4 * 2 + 3), "both factors of four linears, and three that are dense"
    assert all(p.grad is not None and bool(p.grad.any()) for p in learning)
    with torch.no_grad():
        moved = adapted(input_ids=IDS).logits
        assert not torch.allclose(moved, expected, atol=1e-3)
        merged = adapters.merge(adapted)
        torch.testing.assert_close(merged(input_ids=IDS).logits, moved, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == names
    assert merged.config.tie_word_embeddings and merged.lm_head.B is merged.model.embed_tokens.B


def test_adapters_on_factors_go_on_working_beside_views() -> None:
    pytest.importorskip("peft")
    model = compressed("pivoted")
    adapted = adapters.attach(model, Lora(on="factors"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        moved = adapted(input_ids=IDS).logits
        merged = adapters.merge(adapted)
        torch.testing.assert_close(merged(input_ids=IDS).logits, moved, rtol=1e-4, atol=1e-4)
    linears = [module for _, module in swap.factor_modules(merged) if isinstance(module, LowRankLinear)]
    assert len(linears) == 5 and all(follows(module) for module in linears)
