"""What a plugin's strategy or initialiser cannot have is refused when the plan is made, by name."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from lillama import Layer, LillamaError, Weight, registry
from lillama.cli import show
from lillama.plan.plan import choose_ranks
from lillama.recipe.schema import Compress, Recipe
from lillama.run import check, prepare

LAYERS = [Layer("layers.0", (Weight("layers.0.a", (64, 64)), Weight("layers.0.b", (64, 32))))]
BEFORE = 64 * 64 + 64 * 32


def planned(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any], reduction: float = 0.5) -> dict[str, int]:
    monkeypatch.setitem(registry.STRATEGIES._targets, "mine", lambda layers, remove, compress: ranks)
    compress = Compress(reduction=reduction, strategy="mine", storage="factors")
    return choose_ranks(LAYERS, BEFORE, compress).ranks


def test_a_strategy_that_removes_too_little_is_refused_with_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LillamaError) as caught:
        planned(monkeypatch, {"layers.0.a": 16})
    said = str(caught.value)
    removed, possible = 64 * 64 - 16 * 128, BEFORE - 8 * 128 - 8 * 96
    assert f"the strategy 'mine' removes {removed:,} of the 3,072 parameters" in said and f"{possible:,}" in said
    assert caught.value.where == "compress.reduction"
    assert planned(monkeypatch, {"layers.0.a": 16}, removed / BEFORE) == {"layers.0.a": 16}, "just enough"


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"layers.0.aa": 8}, "gives a rank to 'layers.0.aa'.*Did you mean 'layers.0.a'"),
        ({"layers.0.b": 33}, "gives 'layers.0.b' the rank 33.*from 1 to 32"),
        ({"layers.0.a": 0}, "the rank 0"),
        ({"layers.0.a": 8.0}, r"the rank 8\.0"),
    ],
)
def test_ranks_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any], said: str) -> None:
    with pytest.raises(LillamaError, match=f"(?s){said}") as caught:
        planned(monkeypatch, ranks, 0.01)
    assert caught.value.where == "compress.strategy"


def recipe(**compress: Any) -> Recipe:
    return Recipe.parse(
        {
            "model": {"id": "x"},
            "compress": {"reduction": 0.3, **compress},
            "calibration": {"dataset": "x"},
            "run": {"out": "x"},
        }
    )


def embedding_plan(kind: str) -> Any:
    layers = [Layer("embed", (Weight("embed", (64, 64), kind=kind),), "embedding")]  # type: ignore[arg-type]
    return choose_ranks(layers, 64 * 64, Compress(reduction=0.3, strategy="uniform"))


def test_an_initialiser_whose_statistic_an_embedding_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.INITIALISERS._targets, "mine", lambda W, rank, gram=None: None)
    with pytest.raises(LillamaError, match="'mine' wants the Gram of a weight's inputs, and 'embed'") as caught:
        check.check_initialiser(recipe(init="mine"), embedding_plan("embedding"))
    assert caught.value.where == "compress.init"
    check.check_initialiser(recipe(init="mine"), embedding_plan("linear"))
    for init in ("svd", "whitened", "fisher"):
        check.check_initialiser(recipe(init=init), embedding_plan("embedding"))


def test_an_initialiser_that_must_have_both_grams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.INITIALISERS._targets, "mine", lambda W, rank, gram, output_gram: None)
    with pytest.raises(LillamaError, match="'mine' wants both gram and output_gram"):
        check.check_initialiser(recipe(init="mine"), embedding_plan("linear"))


@pytest.mark.parametrize("strategy", ["fisher", "uniform"])
def test_the_plan_says_who_decides_and_when(tmp_path: Any, tiny_llama: Any, strategy: str) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    given = recipe(strategy=strategy, rank_multiple=2, reduction=0.1)
    given = Recipe.parse(given.to_yaml(), [f"model.id={tmp_path / 'model'}", f"run.out={tmp_path / 'run'}"])
    # The data is not looked at: a plan reads none.
    console = Console(width=200, record=True)
    console.print(show.plan(prepare.prepare(given)))
    assert ("fisher decides during the run, by what it measures" in console.export_text()) == (strategy == "fisher")
