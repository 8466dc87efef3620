"""Low-rank experts compute what the fused experts of transformers compute, both ways of running them alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lillama import LillamaError, Weight
from lillama.dense.experts import PROJECTIONS, layout_of
from lillama.factorise import initialisers as init
from lillama.factorise.grams import Grams, choose_gram
from lillama.lowrank import swap as factors
from lillama.lowrank.conversions import use_trainable_storage
from lillama.lowrank.experts import LowRankExperts
from lillama.lowrank.storage import get_storage
from lillama.pretrained.calls import Batch, Call
from lillama.pretrained.forms import Form, Part

E, H, INNER, K = 4, 32, 48, 2


def dense_weight(module, projection):
    return layout_of(module).weight(module, projection)


def experts(implementation="eager"):
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    dense = MixtralExperts(config)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dense.requires_grad_(False)


def routed(tokens=40, only=E):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, H, generator=generator)
    index = torch.rand(tokens, only, generator=generator).topk(K)[1]
    return x, index, torch.rand(tokens, K, generator=generator)


def low_rank(dense, ranks, storage="factors"):
    module = LowRankExperts(dense)
    for name, rank in ranks.items():
        W = dense_weight(dense, name)
        module.factorise(name, get_storage(storage), rank)
        found = [init.svd(one, rank) for one in W]
        module.set_factors(name, *(torch.stack(one) for one in zip(*found)))
    return module


def test_full_rank_is_bit_equal_under_eager():
    dense, inputs = experts(), routed()
    module = LowRankExperts(dense)
    assert torch.equal(module(*inputs), dense(*inputs))
    for name in PROJECTIONS:  # W times the identity, one projection more each time
        W = dense_weight(dense, name)
        module.factorise(name, get_storage("factors"), W.shape[2])
        module.set_factors(name, W, torch.eye(W.shape[2]).expand(E, -1, -1))
        assert torch.equal(module(*inputs), dense(*inputs)), name


@pytest.mark.parametrize("rank", [8, 6])  # 6: not of whole 16 bytes, so without torch's grouped kernel
@pytest.mark.parametrize("only", [E, 2])  # 2: experts that no token reaches
@pytest.mark.parametrize("planned", [PROJECTIONS, ("gate",), ("up", "down")])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_eager_and_grouped_agree_with_their_gradients(rank, only, planned, storage):
    module = low_rank(experts(), dict.fromkeys(planned, rank), storage).requires_grad_(True)
    x, index, weights = routed(only=only)
    found = []
    for implementation in ("eager", "grouped_mm"):
        module.config._experts_implementation = implementation
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0], index, leaves[1])
        gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        found.append([y, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients))])
    for eager, grouped in zip(*found):
        # Of the largest entry: sums in another order differ by a few units in its last place.
        assert (eager - grouped).abs().max() <= 1e-6 * eager.abs().max()


@pytest.mark.parametrize("storage", ["factors", "pivoted", "factors:4:32", "pivoted:8:32"])
def test_low_rank_is_what_the_product_says_under_autocast_too(storage):
    dense, inputs = experts("grouped_mm"), routed()
    module = low_rank(dense, dict.fromkeys(PROJECTIONS, 8), storage)
    expected = module.to_dense()(*inputs)
    torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(*inputs)
    torch.testing.assert_close(half, expected, rtol=0, atol=0.1)
    assert not torch.equal(half, expected)


def test_replace_takes_a_projection_at_a_time_and_copies_of_the_module_work():
    root = nn.ModuleDict({"experts": experts()})
    for projection in ("down", "gate"):
        factors.replace(root, f"experts.{projection}", kind="experts", storage="factors", rank=8)
    module = root["experts"]
    assert set(dict(module.named_parameters())) == {"up_W", "down_A", "down_B", "gate_A", "gate_B"}
    numbers = sum(p.numel() for n, p in module.named_parameters() if n != "up_W")
    assert numbers == E * 8 * (H + INNER) * 2
    assert factors.is_factor(root, "experts.gate_A")
    assert not factors.is_factor(root, "experts.up_W")
    assert set(dict(copy.deepcopy(module).to_dense().named_parameters())) == {"gate_up_proj", "down_proj"}
    with pytest.raises(LillamaError, match="Linear"):
        factors.replace(nn.ModuleDict({"e": nn.Linear(2, 2)}), "e.gate", kind="experts", storage="factors", rank=2)
    with pytest.raises(LillamaError, match="no storage is called 'sparse'"):
        factors.replace(root, "experts.up", kind="experts", storage="sparse", rank=2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_pivoted_experts_are_the_same_map_in_fewer_numbers(implementation):
    dense, inputs = experts(implementation), routed()
    ranks = {"gate": 8, "up": 32, "down": 32}  # full rank: rows beyond the pivots of up, none of down
    plain, module = low_rank(dense, ranks), low_rank(dense, ranks, "pivoted")
    out = module(*inputs)
    torch.testing.assert_close(out, plain(*inputs), rtol=1e-4, atol=1e-4)
    numbers = sum(p.numel() for p in module.parameters())
    assert numbers == sum(E * (r * (H + INNER) - r * r) for r in ranks.values())
    # Loaded into an empty one, copied, and back to factors that can be trained.
    empty = low_rank(experts(implementation), {}).requires_grad_(False)
    for name, rank in ranks.items():
        empty.factorise(name, get_storage("pivoted"), rank)
    empty(*inputs)  # its orders are known before the pivots change
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(*inputs), out) and torch.equal(copy.deepcopy(module)(*inputs), out)
    root = nn.ModuleDict({"experts": module})
    assert use_trainable_storage(root) == [(f"experts.{n}", "experts", "pivoted") for n in ranks]
    assert set(dict(module.named_parameters())) == {f"{name}_{letter}" for name in PROJECTIONS for letter in "AB"}
    torch.testing.assert_close(module(*inputs), out, rtol=1e-4, atol=1e-4)
    for name in PROJECTIONS:
        factors.store_as(root, f"experts.{name}", "experts", "pivoted")
    torch.testing.assert_close(module(*inputs), out, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in module.parameters()) == numbers


WEIGHTS = (
    Weight("l.experts.gate", (INNER, H), E, "experts", "l.experts.in"),
    Weight("l.experts.up", (INNER, H), E, "experts", "l.experts.in"),
    Weight("l.experts.down", (H, INNER), E, "experts", "l.experts.down"),
)


def plain_call(mask):
    """How a block is called that takes hidden states and nothing else."""
    spec = pytree.tree_flatten(((None,), {}))[1]
    return Call([None], spec, Form(((0, 0),), (Part(made=0),)), mask=mask)


def grams(dense, x, index, weights, mask=None):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = dense

        def forward(self, hidden):
            return self.experts(hidden.view(-1, H), index, weights)

    block = Block()
    listener = Grams("l", block, WEIGHTS, 10**6, ("gram", "output_gram"))
    batch = Batch([plain_call(mask)], mask, len(x))
    return listener.add([batch], [x.view(1, -1, H)], 0).close()


def test_grams_are_of_routed_tokens_that_count():
    dense = experts()
    x, index, weights = routed(400)
    mask = (torch.arange(400) % 5 > 0).view(1, -1)
    found = grams(dense, x, index, weights, mask)
    assert set(found["l.experts.down"].known()) == {"output_gram"}
    assert set(found["l.experts.gate"].known()) == {"gram"}
    for e in range(E):
        rows = x[(index == e).any(-1) & mask[0]]
        assert len(rows) > INNER
        torch.testing.assert_close(found["l.experts.up"].gram[e], rows.T @ rows, rtol=1e-4, atol=1e-3)
        gate, up = torch.nn.functional.linear(rows, dense.gate_up_proj[e]).chunk(2, -1)
        y = torch.nn.functional.linear(dense.act_fn(gate) * up, dense.down_proj[e])
        torch.testing.assert_close(found["l.experts.down"].output_gram[e], y.T @ y, rtol=1e-4, atol=1e-2)


def test_an_expert_without_tokens_borrows_the_layer_s():
    dense = experts()
    x, index, weights = routed(400, only=2)  # experts 2 and 3 see nothing
    found = grams(dense, x, index, weights)
    pooled = x.T @ x / len(x)
    torch.testing.assert_close(found["l.experts.gate"].gram[3] / H, pooled, rtol=1e-3, atol=1e-3)
    for name in ("gate", "down"):
        ((argument, matrices),) = found[f"l.experts.{name}"].known().items()
        W = dense_weight(dense, name)[3]
        A, B = init.whitened(W, 8, **{argument: matrices[3]})
        assert torch.isfinite(A @ B).all()
        assert torch.linalg.matrix_rank(matrices[3].double()) > 8


def test_the_smaller_gram_is_chosen_where_either_serves():
    down, q, k = Weight("d", (8, 20)), Weight("q", (20, 20), group="g"), Weight("k", (8, 20), group="g")
    assert choose_gram(down, [down, q, k], ("gram", "output_gram")) == "output_gram"
    assert choose_gram(k, [down, q, k], ("gram", "output_gram")) == "gram"  # q needs the shared one anyway
    assert choose_gram(down, [down], ("gram",)) == "gram"
