"""compress.neurons: which neurons go, what that costs, and how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lillama import Layer, LillamaError, Weight
from lillama.contract import Neurons
from lillama.factorise import neurons
from lillama.factorise.initialisers import INPUT_RIDGE, OUTPUT_RIDGE, fisher_spectrum, regularised
from lillama.factorise.neurons import Whole
from lillama.factorise.sums import Sums
from lillama.plan.budget import Measured, Narrowing
from lillama.plan.fisher import choices
from lillama.plan.neurons import choose_neurons
from lillama.plan.plan import choose_ranks
from lillama.recipe.schema import Compress


def spd(size: int, seed: int) -> Tensor:
    root = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / (3 * size)


def exit_of(d_out: int = 6, width: int = 20) -> Whole:
    W = torch.randn(d_out, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Whole(W, spd(width, 1), spd(d_out, 2))


def loss(one: Whole, other: Tensor) -> Tensor:
    """1/2 tr(G E H E^T) with the ridges that the method has."""
    E = other - one.W
    return 0.5 * torch.trace(regularised(one.output, OUTPUT_RIDGE) @ E @ regularised(one.input, INPUT_RIDGE) @ E.T)


def test_the_first_neuron_to_go_is_the_one_whose_loss_the_others_make_up_for_best():
    one = exit_of()
    going = neurons.order_neurons(one, [20, 19])
    each = []
    for gone in range(20):
        kept = torch.tensor([n for n in range(20) if n != gone])
        best = torch.zeros_like(one.W)
        best[:, kept] = neurons.best_left(one, kept)
        each.append(float(loss(one, best)))
        # It is the best: no other columns lose less.
        for seed in range(3):
            tried = best.clone()
            moved = torch.randn(tried[:, kept].shape, generator=torch.Generator().manual_seed(seed)).double()
            tried[:, kept] += 1e-3 * moved
            assert loss(one, tried) > loss(one, best)
    assert going.order.tolist() == [min(range(20), key=each.__getitem__)]
    assert going.costs[1] == pytest.approx(min(each), rel=1e-9)


@pytest.mark.parametrize("width", [20, 60])  # one block, several
def test_what_neurons_cost_is_what_the_matrix_that_is_left_loses(width):
    one = exit_of(width=width)
    left = [width, width - 10, width - 17, 3]
    order, costs, exits = neurons.order_neurons(one, left)
    assert torch.equal(exits[0], one.W)
    assert costs == sorted(costs) and costs[0] == 0 and len(set(order.tolist())) == width - 3
    for some, cost, matrix in zip(left[1:], costs[1:], exits[1:], strict=True):
        kept = neurons.stay(order, width, some)
        whole = torch.zeros_like(one.W)
        whole[:, kept] = neurons.best_left(one, kept)
        assert torch.allclose(matrix, whole[:, kept], rtol=1e-8, atol=1e-10)
        assert float(loss(one, whole)) == pytest.approx(cost, rel=1e-8)


def test_what_is_left_of_a_weight_is_factorised_as_any_weight():
    """Its factors on the smaller side, whichever side that is after neurons went, give the spectrum of W itself."""
    d, width = 6, 10
    entry = Whole(torch.randn(width, d).double(), spd(d, 1), spd(width, 2))
    for count in (8, 4):  # still taller than wide, and not
        kept = torch.arange(count)
        W, H, G = neurons.without(entry, kept)
        assert torch.equal(W, entry.W[:count]) and len(H) == len(G) == min(count, d)
        by_hand = (W, entry.input, W.T @ entry.output[:count, :count] @ W)
        if count < d:
            by_hand = (W, W @ entry.input @ W.T, entry.output[:count, :count])
        assert torch.allclose(fisher_spectrum(W, H, G), fisher_spectrum(*by_hand))


@given(st.integers(1, 4000), st.floats(0.01, 0.99), st.sampled_from((1, 8, 64)))
def test_widths_fall_from_all_to_what_may_be_left(count, share, multiple):
    found = neurons.widths(count, share, multiple)
    assert found[0] == count and found == sorted(set(found), reverse=True)
    assert all(one % multiple == 0 and one >= count * (1 - share) - 1e-6 for one in found[1:])


@st.composite
def mlps(draw: Any) -> tuple[list[Layer], Measured]:
    """Layers of an MLP and one weight more, with losses that rise as neurons go and spectra that fall."""
    layers, spectra, narrowings = [], {}, {}
    amounts = st.floats(0.01, 5)
    for i in range(draw(st.integers(1, 3))):
        d, width = draw(st.integers(2, 8)), draw(st.sampled_from((8, 12, 16)))
        names = [f"l{i}.up", f"l{i}.down", f"l{i}.o"]
        shapes = [(width, d), (d, width), (d, d)]
        layers.append(Layer(f"l{i}", tuple(map(Weight, names, shapes)), neurons=(Neurons(names[:1], names[1]),)))  # type: ignore[arg-type]

        def falling(size: int) -> list[float]:
            return sorted(draw(st.lists(amounts, min_size=size, max_size=size)), reverse=True)

        spectra |= {name: falling(d) for name in names}
        ways, cost = [Narrowing(width, 0.0, {name: spectra[name] for name in names[:2]})], 0.0
        for left in (width - 4, width - 6):
            cost += draw(amounts)
            ways.append(Narrowing(left, cost, {name: falling(d) for name in names[:2]}))
        narrowings[names[1]] = ways
    return layers, Measured(spectra, {}, narrowings)


@settings(max_examples=40)
@given(mlps(), st.floats(0.05, 0.6))
def test_ranks_and_neurons_out_of_one_budget_reach_it_and_lose_no_more_than_ranks_alone(problem, share):
    layers, measured = problem
    before = sum(w.parameters for layer in layers for w in layer.weights)
    section = Compress.model_validate({"reduction": share, "rank_multiple": 1, "neurons": 0.5})
    try:
        alone = choose_ranks(layers, before, section, measured.spectra)
    except LillamaError:
        return  # ranks alone do not reach it
    narrowed, then = choose_neurons(layers, before, section, measured)
    plan = choose_ranks(narrowed, before, section, then.spectra)
    assert plan.reduction >= share and plan.before == before
    # A step of the hull is all that either may miss of the best.
    assert total(plan, measured, then) <= total(alone, measured, measured) + largest_step(layers, measured, section)
    for layer in plan.layers:
        up, down, _ = layer.weights
        assert up.shape[0] == down.shape[1] and (up.whole is None) == (down.whole is None)


def total(plan: Any, measured: Measured, then: Measured) -> float:
    found = 0.0
    for name, rank in plan.ranks.items():
        found += sum(then.spectra[name][rank:]) / 2
    for mlp in (one for layer in plan.layers for one in layer.neurons):
        left = plan.weights[mlp.exit].shape[1]
        found += next(way.loss for way in measured.narrowings[mlp.exit] if way.left == left)
    return found


def largest_step(layers: list[Layer], measured: Measured, section: Compress) -> float:
    spectra = [*measured.spectra.items()]
    spectra += [item for ways in measured.narrowings.values() for way in ways for item in way.spectra.items()]
    costs = [way.loss for ways in measured.narrowings.values() for way in ways]
    return sum(sum(values) / 2 for _, values in spectra) / len(spectra) * 3 + max(costs)


def test_a_cheap_neuron_goes_before_a_dear_component():
    up, down = Weight("l.up", (16, 4)), Weight("l.down", (4, 16))
    layers = [Layer("l", (up, down), neurons=(Neurons(("l.up",), "l.down"),))]
    dear = {"l.up": [9.0] * 4, "l.down": [9.0] * 4}
    measured = Measured(dear, {}, {"l.down": [Narrowing(16, 0.0, dear), Narrowing(8, 0.001, dear)]})
    section = Compress.model_validate({"reduction": 0.5, "rank_multiple": 1, "neurons": 0.5})
    narrowed, then = choose_neurons(layers, 128, section, measured)
    plan = choose_ranks(narrowed, 128, section, then.spectra)
    assert plan.ranks == {} and plan.shapes() == {"l.up": [8, 4], "l.down": [4, 8]} and plan.after == 64
    assert plan.changes(plan.layers[0]) and plan.work == list(plan.layers)
    # A weight that the recipe skips keeps its MLP whole.
    section = Compress.model_validate({"reduction": 0.2, "rank_multiple": 1, "neurons": 0.5, "skip": ["*up"]})
    assert choose_neurons(layers, 128, section, measured)[0] == layers


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_larger_factor_is_of_inputs_of_a_wide_weight_and_of_gradients_of_a_tall_one(shape):
    d_out, d_in = shape
    W, x, g, more = torch.randn(shape), torch.randn(30, d_in), torch.randn(30, d_out), torch.randn(20, d_in)
    sums = Sums(W, both=True)
    sums.add(x, g)
    sums.count_inputs(more)
    length = g.square().sum(-1, keepdim=True).double()
    counts = length / (length + length.mean())
    H = ((x * counts).T @ x.double() + more.T.double() @ more.double()) / (counts.sum() + 20)
    expected = H if d_out < d_in else g.T.double() @ g.double() / 30
    assert torch.allclose(sums.larger_factor(30), expected, rtol=1e-5, atol=1e-6)
    assert any(one is sums.larger for one in sums.of_inputs) == (d_out < d_in)  # what inputs alone may add to


def test_every_choice_of_an_mlp_is_of_the_width_it_is_for():
    section = Compress.model_validate({"reduction": 0.5, "rank_multiple": 1})
    weight = Weight("l.down", (4, 8), whole=(4, 16))
    assert weight.original_parameters == 64 and weight.parameters == 32
    assert [one.numbers for one in choices(weight, [1.0] * 4, section)][-1] == 32
