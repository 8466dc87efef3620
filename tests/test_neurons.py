"""compress.neurons: which neurons go, what that costs, how many, and the checkpoint that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, OPTConfig

import lillama
from lillama import Layer, LillamaError, Weight
from lillama.checkpoint.export import export_dense
from lillama.cli.pluginfile import plugin_file
from lillama.cli.trace import summary
from lillama.contract import Neurons
from lillama.factorise import neurons
from lillama.factorise.initialisers import INPUT_RIDGE, OUTPUT_RIDGE, fisher_spectrum, regularised
from lillama.factorise.neurons import Whole
from lillama.factorise.sums import Sums
from lillama.lowrank.counts import stored
from lillama.lowrank.narrow import narrow, widened
from lillama.plan.budget import Measured, Narrowing
from lillama.plan.fisher import choices
from lillama.plan.neurons import choose_neurons
from lillama.plan.plan import choose_ranks
from lillama.pretrained.neurons import candidates, largest_change
from lillama.pretrained.trace import trace
from lillama.recipe.schema import Compress, Recipe
from lillama.run import prepare
from lillama.testing import token_batches

CHANGES: dict[str, Any] = {"neurons": 0.5, "reduction": 0.3, "rank_multiple": 2, "fisher_tokens": 200}


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


def recipe(model: Path, out: Path, **changes: Any) -> Recipe:
    distill = {"schedule": "sequential", "batch_size": 2, **changes.pop("distill", {})}
    return Recipe.parse(
        {
            "model": {"id": str(model), "dtype": "float32"},
            "compress": {**CHANGES, **changes},
            "distill": distill,
            "calibration": {"dataset": "given"},
            "run": {"out": str(out), "device": "cpu", "compute": "float32"},
        }
    )


@pytest.fixture
def model(tmp_path: Path) -> Any:
    found = tiny("llama-bias")
    found.save_pretrained(tmp_path / "model")
    return found


def batches() -> list[dict[str, Tensor]]:
    return token_batches(tiny("llama-bias"), length=20)


def run(recipe: Recipe) -> Any:
    return lillama.compress(recipe, batches=batches())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batches()[0]["input_ids"]).logits


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_removes_neurons_and_its_checkpoint_is_as_small_as_planned(model, tmp_path, schedule, epochs):
    result = run(recipe(tmp_path / "model", tmp_path / "run", distill={"schedule": schedule, "epochs": epochs}))
    plan = result.plan
    gone = plan.weights["model.layers.0.mlp.down_proj"]
    assert gone.whole == (32, 48) and gone.shape[1] < 48
    loaded = lillama.load(result.path)
    assert sum(p.numel() for p in loaded.parameters()) == plan.after < 0.7 * plan.before
    up = loaded.model.layers[0].mlp.up_proj
    assert (up.out_features, up.in_features) == (gone.shape[1], 32) and up.bias.shape == (gone.shape[1],)
    said = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert said["version"] == 3 and said["shapes"]["model.layers.0.mlp.down_proj"] == [32, gone.shape[1]]
    row = next(r for r in plan.to_dict()["weights"] if r["weight"] == "model.layers.0.mlp.down_proj")
    assert row["shape"] == [32, 48] and row["left"] == [32, gone.shape[1]] and row["parameters"] == 32 * 48
    rank = plan.ranks.get(gone.name)
    assert row["after"] == (gone.parameters if rank is None else stored(gone, rank, plan.storage))
    assert "neurons" in plan.summary()


@pytest.mark.parametrize("updates", [0, 2])
def test_neurons_alone_go_where_no_factors_save_enough(model, tmp_path, updates):
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran\n" * 20)
    changes = {"reduction": 0.15, "keep_dense_below": 0.99, "distill": {"epochs": 0}}
    made = recipe(tmp_path / "model", tmp_path / "run", **changes)
    finetune = {"dataset": str(tmp_path / "text.txt"), "steps": updates, "sequence_length": 8, "teacher": 1.0}
    result = run(Recipe.parse({**made.model_dump(exclude_unset=True), "finetune": finetune if updates else None}))
    assert result.plan.ranks == {} and result.plan.after <= 0.85 * result.plan.before
    loaded = lillama.load(result.path)
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after
    narrow_ones = [one for one in loaded.modules() if isinstance(one, nn.Linear) and 48 not in one.weight.shape]
    assert len(narrow_ones) > 12  # attention and the head, and what lost neurons
    assert torch.isfinite(logits(loaded)).all()
    # More than half of every MLP is not to be had.
    with pytest.raises(LillamaError, match="reduction"):
        run(recipe(tmp_path / "model", tmp_path / "other", **{**changes, "reduction": 0.4}))


def test_neurons_that_matter_least_go_and_the_others_make_up_for_them(model, tmp_path):
    """Of an MLP half of whose neurons are never read nearly nothing is lost with half of them."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-4
    model.save_pretrained(tmp_path / "half")
    skip = ["*self_attn*"]
    changes = {"reduction": 0.3, "of": "weights", "skip": skip, "distill": {"epochs": 0}}
    found = logits(lillama.load(run(recipe(tmp_path / "half", tmp_path / "one", **changes)).path))
    ranks = {**changes, "neurons": None, "reduction": 0.3}
    other = logits(lillama.load(run(recipe(tmp_path / "half", tmp_path / "two", **ranks)).path))
    expected = logits(model)
    assert (found - expected).norm() < 0.1 * (other - expected).norm()


def test_written_dense_the_neurons_are_zeros_and_the_numbers_the_same(model, tmp_path):
    result = run(recipe(tmp_path / "model", tmp_path / "run"))
    export_dense(result.path, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (48, 32)
    assert torch.allclose(logits(dense), logits(lillama.load(result.path)), atol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_weights(model, tmp_path, monkeypatch):
    whole = run(recipe(tmp_path / "model", tmp_path / "whole"))

    def stop(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    asked = recipe(tmp_path / "model", tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr("lillama.run.pipeline.remove_neurons", stop)  # the plan is settled, nothing is removed yet
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    with monkeypatch.context() as patched:
        patched.setattr("lillama.run.pipeline.checkpoint.write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    for file in (tmp_path / "stopped" / "layers").glob("0001*"):
        file.unlink()  # a layer that was not finished
    found = run(asked)
    assert found.plan == whole.plan
    assert torch.equal(logits(lillama.load(found.path)), logits(lillama.load(whole.path)))
    assert not (tmp_path / "stopped" / "sensitivity").exists()


def test_a_plan_that_was_lost_is_read_off_the_checkpoint(model, tmp_path):
    asked = recipe(tmp_path / "model", tmp_path / "run")
    first = run(asked)
    (tmp_path / "run" / "plan.json").unlink()
    (tmp_path / "run" / "metrics.json").unlink()
    again = run(asked)
    assert again.plan.shapes() == first.plan.shapes() and again.plan.after == first.plan.after


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"reduction": None, "size": 0.8}, "compress.neurons"),
        ({"strategy": "uniform"}, "compress.neurons"),
        ({"init": "whitened"}, "compress.neurons"),
        ({"neurons": 1.0}, "compress.neurons"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(model, tmp_path, changes, where):
    with pytest.raises(LillamaError, match="neurons") as caught:
        prepare.prepare(recipe(tmp_path / "model", tmp_path / "run", **changes))
    assert where in str(caught.value) and not (tmp_path / "run").exists()


def test_a_model_without_such_mlps_is_refused(tmp_path):
    tiny("phi3").save_pretrained(tmp_path / "model")
    with pytest.raises(LillamaError, match="no MLP of this model is known"):
        prepare.prepare(recipe(tmp_path / "model", tmp_path / "run"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([3], "shapes are a list"),
        ({"model.layers.0.mlp.up_proj": [24]}, "two whole numbers"),
        ({"model.layers.0.mlp.up_proj": [480, 32]}, "can be left"),
        ({"model.layers.0.mlp": [24, 32]}, "only an nn.Linear"),
        ({"model.layers.9.mlp.up_proj": [24, 32]}, "no such module"),
    ],
)
def test_shapes_that_anybody_wrote_are_checked(model, tmp_path, shapes, message):
    result = run(recipe(tmp_path / "model", tmp_path / "run"))
    path = result.path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["shapes"] = shapes
    path.write_text(json.dumps(config))
    (result.path / "lillama.manifest.json").unlink()
    with pytest.raises(LillamaError, match=message):
        lillama.load(result.path)


def test_a_plan_with_fewer_neurons_is_no_plan_for_a_model_in_memory(model, tmp_path):
    plan = run(recipe(tmp_path / "model", tmp_path / "run")).plan
    with pytest.raises(LillamaError, match="removes neurons"):
        lillama.factorise_(tiny("llama-bias"), plan)


def test_a_linear_is_narrowed_and_widened_with_zeros():
    root = nn.ModuleDict({"a": nn.Linear(6, 8)})
    old = root["a"]
    weight, bias = old.weight.detach()[:5].clone(), old.bias.detach()[:5].clone()
    new = narrow(root, "a", (5, 6), weight, bias)
    x = torch.randn(3, 6)
    assert root["a"] is new and torch.equal(new(x), nn.functional.linear(x, weight, bias))
    wide = widened(new, (8, 7))
    padded = nn.functional.pad(x, (0, 1), value=9.0)
    assert torch.allclose(wide(padded), nn.functional.pad(new(x), (0, 3)))
    with pytest.raises(LillamaError, match="can be left"):
        narrow(root, "a", (9, 6))


def test_tracing_finds_mlps_and_proves_them():
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    layers = trace(AutoModelForCausalLM.from_config(config))
    found = [mlp for layer in layers for mlp in layer.neurons]
    assert [mlp.exit for mlp in found] == [f"model.decoder.layers.{i}.fc2" for i in range(2)]
    assert found[0].entries == found[0].biases == ("model.decoder.layers.0.fc1",)
    # Values of an attention are as wide as what reads them, and are no neurons.
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj") in candidates(layers[0])


def test_an_mlp_with_a_norm_inside_is_none_whose_neurons_may_go():
    config = BitNetConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    layers = trace(model)
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names in candidates(layers[0]) and not any(layer.neurons for layer in layers)
    wrong = Neurons(tuple(f"model.layers.0.{one}" for one in names[:2]), "model.layers.0.mlp.down_proj")
    with pytest.raises(RuntimeError, match="must match"):  # its norm is of all of them
        largest_change(model.eval(), [wrong], logits)
    for layer in model.model.layers:
        layer.mlp.ffn_sub_norm = nn.LayerNorm(64, elementwise_affine=False)
        layer.mlp.ffn_sub_norm.forward = lambda x: nn.functional.layer_norm(x, x.shape[-1:])
    assert largest_change(model, [wrong], logits) > 100


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


def test_the_plugin_that_tracing_writes_names_the_mlps(tmp_path):
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = AutoModelForCausalLM.from_config(config)
    layers = trace(model)
    text = plugin_file(model, layers)
    assert 'NEURONS = ("fc1", "fc2")' in text
    scope: dict[str, Any] = {}
    exec(compile(text, "plugin", "exec"), scope)
    assert [layer.neurons for layer in scope["enumerate_layers"](model)] == [layer.neurons for layer in layers]
    assert "neurons: model.decoder.layers.0.fc1 -> model.decoder.layers.0.fc2" in summary(layers)
