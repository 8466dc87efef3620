"""compress.size: ranks and bits out of one budget of bytes, which the written checkpoint keeps to the byte."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from test_bits import D_IN, D_OUT, gram
from test_quantize_run import own_cache, recipe, settings

import lillama
from lillama import Layer, LillamaError, Weight
from lillama.bits.moments import Moments
from lillama.bits.weights import round_matrix
from lillama.cli import show
from lillama.factorise import kfac, rounding
from lillama.lowrank.counts import held_bytes
from lillama.lowrank.rounded import read_name
from lillama.lowrank.storage import get_storage
from lillama.plan import within
from lillama.plan.budget import Budget, Measured
from lillama.recipe.schema import Compress, Recipe
from lillama.run import pipeline, prepare

__all__ = ["own_cache"]  # a fixture that every test here uses

RANKED = ("pivoted:4:32", "factors:4:32", "pivoted:8:32", "factors:8:32")
SMALL = {"size": 0.2, "rank_multiple": 2, "init": "svd"}
AUTO = {"bits": "auto", "what": "all"}


def bytes_of(path: Path) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in load_file(path / "model.safetensors").values())


@st.composite
def problems(draw: Any) -> tuple[list[Layer], Measured]:
    """Layers of random weights, with spectra that fall, and what rounding costs; of some nothing is known."""
    weights, spectra, costs = [], {}, {}
    shapes = st.tuples(st.integers(2, 32), st.integers(1, 12).map(lambda n: 2 * n))
    for i, (shape, copies) in enumerate(draw(st.lists(st.tuples(shapes, st.integers(1, 3)), min_size=1, max_size=5))):
        weights.append(Weight(f"l.w{i}", shape, copies=copies))
        if draw(st.integers(0, 5)):
            values = st.floats(0, 10, allow_subnormal=False)
            size = min(shape)
            spectra[f"l.w{i}"] = sorted(draw(st.lists(values, min_size=size, max_size=size)), reverse=True)
            costs[f"l.w{i}"] = draw(values)
    return [Layer("l", tuple(weights))], Measured(spectra, costs)


def budget(weights: tuple[Weight, ...], most: int, outside: int) -> Budget:
    before = outside + sum(4 * w.parameters for w in weights)
    names = [w.name for w in weights]
    dense = dict.fromkeys(names, ("dense:4:32", "dense:8:32"))
    return Budget(before, most, 4, outside, dense, dict.fromkeys(names, RANKED))


def loss_of(plan: Any, compress: Compress, measured: Measured, bounds: Budget) -> float:
    total = 0.0
    for weight in plan.weights.values():
        found = within.options(weight, compress, bounds, measured)
        kept = (plan.ranks.get(weight.name), plan.forms[weight.name])
        total += next(one.loss for one in found if (one.rank, one.form) == kept)
    return total


@hypothesis_settings(max_examples=30)
@given(problems(), st.integers(0, 1000), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_bytes_are_kept_and_more_of_them_never_cost_more(
    problem: tuple[list[Layer], Measured], outside: int, shares: list[float]
) -> None:
    layers, measured = problem
    compress = Compress(size=0.5, rank_multiple=2)
    weights = layers[0].weights
    most = outside + sum(held_bytes(w, None, "dense:8:32", 4) for w in weights)
    try:
        within.choose_within(layers, 1, compress, budget(weights, 0, outside), measured)
        raise AssertionError
    except LillamaError as error:
        assert "the smallest possible is " in str(error) and error.where == "compress.size"
        least = _least(error)
    losses = []
    for room in sorted(int(least + share * (most - least)) for share in (0.0, *shares, 1.0)):
        bounds = budget(weights, room, outside)
        plan = within.choose_within(layers, 1, compress, bounds, measured)
        held = outside + sum(held_bytes(w, plan.ranks.get(w.name), plan.forms[w.name], 4) for w in weights)
        assert plan.bytes == held <= room
        assert all(name in plan.kept for name in plan.weights if name not in measured.spectra)
        losses.append(loss_of(plan, compress, measured, bounds))
    for less, more in itertools.pairwise(losses):
        assert more <= less * (1 + 1e-9) + 1e-12
    with pytest.raises(LillamaError):
        within.choose_within(layers, 1, compress, budget(weights, least - 1, outside), measured)


def _least(error: LillamaError) -> int:
    return int(error.what.rpartition("possible is ")[2].split(", ", 1)[1].removesuffix(" bytes").replace(",", ""))


def test_a_weight_that_has_to_stay_dense_stays_in_its_bits() -> None:
    weights = (Weight("l.a", (32, 32)), Weight("l.b", (32, 32)))
    flat = Measured({w.name: [1.0] * 4 + [1e-6] * 28 for w in weights}, dict.fromkeys(("l.a", "l.b"), 0.1))
    most = 2 * held_bytes(weights[0], 8, "factors:8:32", 4)
    plan = within.choose_within([Layer("l", weights)], 2048, Compress(size=0.5), budget(weights, most, 0), flat)
    assert plan.ranks.keys() == {"l.a", "l.b"}
    bits = {name: read_name(form)[1] for name, form in plan.forms.items()}  # type: ignore[index]
    kept = plan.keep_dense({"l.a": "for once"})
    assert kept.forms == {**plan.forms, "l.a": f"dense:{bits['l.a']}:32"}
    assert kept.bytes == held_bytes(weights[0], None, kept.forms["l.a"], 4) + held_bytes(
        weights[1], plan.ranks["l.b"], plan.forms["l.b"], 4
    )
    rows = {row["weight"]: row for row in kept.to_dict()["weights"]}
    assert rows["l.a"]["bits"] == bits["l.a"] and rows["l.b"]["form"] == plan.forms["l.b"]
    assert kept.to_dict()["bytes"] == {"before": 8192, "after": kept.bytes, "most": most}
    few = Compress(size=0.5, keep_dense_below=0.9)
    assert not within.choose_within([Layer("l", weights)], 2048, few, budget(weights, 4000, 0), flat).ranks


@pytest.mark.parametrize("shape", [(D_OUT, D_IN), (2 * D_IN, D_IN)])
def test_what_rounding_costs_is_foretold(shape: tuple[int, int], monkeypatch: Any) -> None:
    """From what is summed while a layer runs back, on either side of a weight."""
    torch.manual_seed(3)
    W = torch.randn(shape)
    roots = [torch.linalg.cholesky(gram(n, seed) + 1e-6 * torch.eye(n)) for n, seed in ((shape[1], 1), (shape[0], 2))]
    x, g = (torch.randn(4096, len(root)) @ root.T for root in roots)
    sums = kfac.Sums(W, rounding=32)
    sums.add(x, g)
    c = g.square().sum(-1, keepdim=True)
    c = c / (c + c.mean())
    known = Moments((x * c).T @ x / c.sum(), g.T @ g / 4096)
    foretold = within.DENSE_LOSS * sums.cost(4096)
    for bits, steps in ((4, 1), (8, within.STEPS)):
        storage = get_storage(f"dense:{bits}:32")
        E = storage.product(rounded := round_matrix(storage, {"W": W}, known), storage.derive(rounded)) - W
        lost = float(((known.outputs @ E @ known.inputs) * E).sum()) / 2
        assert 0.6 < lost / (foretold / steps**2) < 1.6
    monkeypatch.setattr(rounding, "WIDEST", 32)
    coarse = kfac.Sums(W, rounding=32)
    coarse.add(x, g)
    assert coarse.cost(4096) >= sums.cost(4096) * 0.999, "what is not known of inputs is not made up for"


def settings_of(**compress: Any) -> dict[str, Any]:
    return {
        "model": {"id": "x"},
        "compress": compress,
        "calibration": {"dataset": "d"},
        "run": {"out": "o"},
    }


@pytest.mark.parametrize(
    ("compress", "quantize", "where", "said"),
    [
        ({"size": 0.2, "reduction": 0.2}, None, "compress.size", "both say how small"),
        ({}, None, "recipe", "'compress.reduction' is missing\n  Add it, or compress.size."),
        ({"reduction": 0.2}, {"bits": "auto"}, "quantize.bits", "bits: auto shares out the bytes of compress.size"),
        ({"size": 0.2, "strategy": "uniform"}, None, "compress.strategy", "'uniform' counts parameters"),
        ({"size": 0.2, "of": "weights"}, None, "compress.of", "the whole model's bytes"),
        ({"size": 0.2}, {"method": "nearest"}, "quantize.method", "Use quantize.method: compensated"),
        ({"size": 1.2}, None, "compress.size", "less than 1"),
    ],
)
def test_what_does_not_go_together_is_refused(compress: Any, quantize: Any, where: str, said: str) -> None:
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(settings_of(**compress) | {"quantize": quantize})
    assert said in str(caught.value) and where in str(caught.value.where)
    read = Recipe.parse(settings_of(reduction=0.3), ["compress.reduction=null", "compress.size=0.3"])
    assert read.compress.reduction is None and Recipe.parse(read.to_yaml()) == read


def test_a_size_out_of_reach_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match="the smallest possible is 0") as caught:
        prepare.make_plan(recipe(tmp_path, compress=SMALL | {"size": 0.01}, quantize=AUTO))
    least = float(str(caught.value).partition("possible is ")[2].partition(",")[0])
    plan = prepare.make_plan(recipe(tmp_path, compress=SMALL | {"size": least}, quantize=AUTO))
    assert plan.bytes is not None and plan.budget is not None and plan.bytes <= plan.budget.most


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pipeline.Result]:
    """The home of a run in one budget, and what it gave."""
    home = tmp_path_factory.mktemp("budget")
    return home, pipeline.compress(recipe(home, compress=SMALL, quantize=AUTO))


def test_the_checkpoint_takes_no_more_than_was_asked(finished: tuple[Path, pipeline.Result]) -> None:
    home, result = finished
    plan, path = result.plan, home / "run"
    assert result.path == path / "quantized"
    original = sum(p.numel() * 4 for p in lillama.load(path / "model").parameters()) + 4 * plan.removed
    held = json.loads((path / "plan.json").read_text())
    assert held["bytes"]["before"] == original and held["bytes"]["most"] == int(0.2 * original)
    assert {row.get("bits") for row in held["weights"]} == {4, 8} and plan.ranks, "bits and ranks both gave"
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]["modules"]
    chosen = {name: how["storage"] for name, how in config.items()}
    assert bytes_of(result.path) == plan.bytes_as({name: chosen[name] for name in plan.forms})
    assert plan.bytes is not None and plan.bytes <= 0.2 * original and bytes_of(result.path) <= 0.2 * original
    assert bytes_of(result.path) > 0.98 * 0.2 * original, "nor much less"
    assert (
        {name: read_name(form)[1:] for name, form in plan.forms.items()}
        == {  # type: ignore[index]
            name: read_name(chosen[name])[1:]
            for name in plan.forms  # type: ignore[index]
        }
    )
    assert (
        result.metrics["quantized"]["perplexity/perplexity"] < 1.2 * result.metrics["before"]["perplexity/perplexity"]
    )
    assert "4 or 8 bits" in (result.path / "README.md").read_text()


def test_another_process_loads_it(finished: tuple[Path, pipeline.Result]) -> None:
    code = "import sys, lillama, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); " + (
        "print(sum(p.numel() for p in m.parameters()))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, str(finished[1].path)], capture_output=True, text=True, env=env, check=True
    )
    assert int(out.stdout.split()[-1]) > 0


def test_other_bits_are_another_plan_and_refused(finished: tuple[Path, pipeline.Result]) -> None:
    """Ranks depend on them; what rounding is fitted on decides no rank."""
    with pytest.raises(LillamaError, match=r'recipe\.quantize\.bits: "auto" there, 4 here'):
        pipeline.compress(recipe(finished[0], compress=SMALL, quantize=AUTO | {"bits": 4}))
    again = pipeline.compress(recipe(finished[0], compress=SMALL, quantize=AUTO))
    assert again.plan == finished[1].plan
    with pytest.raises(LillamaError, match="another tokens"):
        pipeline.compress(recipe(finished[0], compress=SMALL, quantize=AUTO | {"tokens": 64}))


@pytest.mark.parametrize("damaged", [(), ("plan.json",), ("forms.json",), ("plan.json", "forms.json")])
def test_a_run_that_was_stopped_goes_on_with_its_bits(
    finished: tuple[Path, pipeline.Result], tmp_path: Path, damaged: tuple[str, ...]
) -> None:
    home, out = finished[0], tmp_path / "run"
    shutil.copytree(home / "run", out)
    shutil.rmtree(out / "quantized")
    wanted = recipe(home, compress=SMALL, quantize=AUTO, run={**settings(home)["run"], "out": str(out)})
    for name in damaged:
        (out / name).write_text("{")
    if len(damaged) == 2:
        with pytest.raises(LillamaError, match="is lost"):
            pipeline.compress(wanted)
        return
    result = pipeline.compress(wanted)
    assert result.plan.forms == finished[1].plan.forms
    weights = (place / "model.safetensors" for place in (result.path, finished[1].path))
    assert len({file.read_bytes() for file in weights}) == 1


@pytest.mark.parametrize(
    ("name", "size", "section", "more"),
    [
        ("llama-bias", 0.8, None, {}),  # ranks alone, in the type of the model
        ("llama-bias", 0.4, {"bits": "auto"}, {}),
        ("llama-bias", 0.15, {"bits": 4, "what": "all", "storage": "keep"}, {}),
        ("llama", 0.55, {"bits": "auto", "what": "factors"}, {}),
        ("llama", 0.6, {"bits": 8}, {}),  # room for all in 8 bits: no rank at all
        ("llama", 0.13, {"bits": "auto", "what": "all"}, {"embedding": True}),
        ("llama", 0.93, None, {"embedding": True, "skip": ["*layers*"]}),  # a tied head has row numbers of its own
        ("llama", 0.25, {"bits": 8, "what": "all", "storage": "keep"}, {"embedding": True, "skip": ["*layers*"]}),
    ],
)
@pytest.mark.slow
def test_every_kind_of_result_takes_the_bytes_that_were_counted(
    tmp_path: Path, name: str, size: float, section: Any, more: Any
) -> None:
    given = recipe(tmp_path, name, compress=SMALL | {"size": size} | more, quantize=section, evaluate={})
    prepared = prepare.prepare(given)
    console = Console(width=200)
    with console.capture() as said:
        console.print(show.plan(prepared))
    assert "at most" in said.get()
    result = pipeline.compress(given)
    plan, got = result.plan, bytes_of(result.path)
    assert plan.budget is not None and plan.bytes is not None
    assert plan.bytes <= plan.budget.most == int(size * plan.budget.before) and got <= plan.budget.most
    if section is None:
        assert got == plan.bytes and plan.ranks
    else:
        modules = json.loads((result.path / "config.json").read_text())["quantization_config"]["modules"]
        assert got == plan.bytes_as({n: modules[n]["storage"] for n in plan.forms})
        forms = {modules[n]["storage"].partition(":")[0] for n in plan.ranks}
        assert plan.ranks or size == 0.6
        assert section.get("storage") != "keep" or forms == {"pivoted"}
