"""Registries: names, lazy targets, and schemas made from signatures."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from lillama import registry
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe
from lillama.registry import Registry

if TYPE_CHECKING:
    from nowhere import Model


class Split(Enum):
    TEST = "test"


def evaluator(
    model: Model,
    *,
    dataset: Annotated[str, Field(description="Where the text is.")],
    limit: int | None = None,
    scale: Annotated[float, Field(gt=0)] = 1.0,
    exact: bool = False,
    lengths: tuple[int, ...] = (1, 2),
    kind: Literal["a", "b"] = "a",
    folder: Path = Path("x"),
    split: Split = Split.TEST,
    anything=None,
) -> dict[str, float]:
    """What it measures."""
    return {}


@pytest.fixture
def names() -> Registry:
    return Registry("evaluator", {"lazy": "json:dumps", "absent": "lillama_absent:f", "typo": "json:dmps"})


def test_a_name_is_imported_on_use(names: Registry) -> None:
    import json

    assert names.get("lazy") is json.dumps
    assert "lazy" in names
    assert list(names) == ["absent", "lazy", "typo"]


def test_an_unknown_name_has_a_place_and_a_suggestion(names: Registry) -> None:
    with pytest.raises(LillamaError) as caught:
        names.check("lasy", "r.yaml:3: evaluate.lasy")
    assert caught.value.where == "r.yaml:3: evaluate.lasy"
    assert caught.value.what == "no evaluator is called 'lasy'"
    assert caught.value.hint == "Did you mean 'lazy'?"
    with pytest.raises(LillamaError, match="Known: absent, lazy, typo"):
        names.get("zzzz")
    with pytest.raises(LillamaError, match="Did you mean 'lazy'"):
        names.check("LAZY")


@pytest.mark.parametrize("name", ["absent", "typo"])
def test_a_target_that_cannot_be_imported_is_named(names: Registry, name: str) -> None:
    with pytest.raises(LillamaError, match=f"the evaluator '{name}' cannot be loaded from"):
        names.get(name)


def test_adding(names: Registry) -> None:
    names.add("mine", evaluator)
    assert names.get("mine") is evaluator
    names.add("mine", evaluator)  # the same again, as a second host in one process does
    with pytest.raises(LillamaError, match="'mine' is already registered"):
        names.add("mine", "json:dumps")
    with pytest.raises(LillamaError, match="'lazy' is already registered"):
        names.add("lazy", evaluator)
    with pytest.raises(LillamaError, match="neither a function"):
        names.add("broken", 3)  # type: ignore[arg-type]
    with pytest.raises(LillamaError, match="neither a function"):
        names.add("broken", "json.dumps")
    assert "broken" not in names


def test_a_signature_is_a_schema(names: Registry) -> None:
    names.add("mine", evaluator)
    schema = names.options("mine")
    options = schema.model_validate(
        {"dataset": "d", "limit": 1e6, "scale": 2, "lengths": [4, 8], "folder": "y", "split": "test"}
    )
    assert options.model_dump() == {
        "dataset": "d",
        "limit": 1_000_000,
        "scale": 2.0,
        "exact": False,
        "lengths": (4, 8),
        "kind": "a",
        "folder": Path("y"),
        "split": Split.TEST,
        "anything": None,
    }
    described = schema.model_json_schema()
    assert described["description"] == "What it measures."
    assert described["required"] == ["dataset"]
    assert described["properties"]["dataset"]["description"] == "Where the text is."


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": "3"},
        {"limit": 1.5},
        {"limit": True},
        {"scale": "2"},
        {"scale": 0},
        {"scale": float("inf")},
        {"exact": "no"},
        {"exact": 1},
        {"kind": "c"},
        {"dataset": 3},
        {"unknown": 1},
    ],
)
def test_what_does_not_fit_a_signature_is_refused(names: Registry, wrong: dict[str, object]) -> None:
    names.add("mine", evaluator)
    schema = names.options("mine")
    schema.model_validate({"dataset": "d"})
    with pytest.raises(ValidationError) as caught:
        schema.model_validate({"dataset": "d"} | wrong)
    assert [problem["loc"][0] for problem in caught.value.errors()] == list(wrong)


def test_an_option_whose_type_is_not_imported_is_named(names: Registry) -> None:
    def broken(model: Model, *, other: Model) -> dict[str, float]:
        return {}

    names.add("broken", broken)
    with pytest.raises(LillamaError, match="option 'other' of the evaluator 'broken'"):
        names.options("broken")


ALL = [known for known in vars(registry.Registries).values() if isinstance(known, Registry)]


@pytest.mark.parametrize("builtin", ALL, ids=lambda builtin: builtin.kind)
def test_every_builtin_name_leads_to_a_function_that_is_called_as_it_asks(builtin: Registry) -> None:
    for name in builtin:
        found = builtin.get(name)
        assert callable(found)
        if builtin.call:
            builtin.call.check(f"the {builtin.kind} '{name}'", found)


def test_plugins_may_add_to_every_registry() -> None:
    assert set(ALL) == {known for known in vars(registry).values() if isinstance(known, Registry)}


# Discovery


@pytest.fixture
def discovery(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was discovered: a module of this test stands where the host does."""
    calls: list[str] = []
    names = Registry("fruit", {"apple": "json:dumps"})

    def fill() -> None:
        calls.append("called")
        assert "pear" not in names  # it may look things up itself
        names.add("pear", "json:loads")

    monkeypatch.setitem(sys.modules, "stand_in_for_the_host", SimpleNamespace(fill=fill, names=names))
    registry.discover_with("stand_in_for_the_host:fill")
    yield calls
    registry.discover_with("lillama.host:register_all")


@pytest.mark.parametrize(
    "look_up",
    [
        lambda names: names.check("pear"),
        lambda names: names.get("pear"),
        lambda names: names.options("pear"),
        lambda names: names.needs("pear"),
        lambda names: list(names) == ["apple", "pear"] or pytest.fail("pear is missing"),
        lambda names: "pear" in names or pytest.fail("pear is missing"),
        lambda names: len(names) == 2 or pytest.fail("pear is missing"),
    ],
)
def test_whatever_is_looked_up_first_finds_what_plugins_add(discovery: list[str], look_up: Any) -> None:
    names = sys.modules["stand_in_for_the_host"].names
    for _ in range(2):
        look_up(names)
    assert discovery == ["called"]


def test_a_discovery_that_fails_is_told_to_everyone_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise LillamaError("LILLAMA_PLUGINS names nobody")

    monkeypatch.setattr("lillama.host.register_all", broken)
    registry.discover_again()
    for _ in range(2):
        with pytest.raises(LillamaError, match="names nobody"):
            registry.LOSSES.check("teacher")
    monkeypatch.undo()
    registry.LOSSES.check("teacher")


def test_names_of_plugins() -> None:
    registry.PLUGINS.check("auto")
    registry.PLUGINS.check("decoder")
    with pytest.raises(LillamaError) as caught:
        registry.PLUGINS.check("decodr", "r.yaml:3: plugin")
    assert str(caught.value) == "r.yaml:3: plugin: no plugin is called 'decodr'\n  Did you mean 'decoder'?"


# What the engine gives


def misspelt(W: Any, rank: int, grm: Any) -> None: ...


def with_a_default(W: Any, rank: int, output_gramm: Any = None) -> None: ...


def of_one_argument(W: Any) -> None: ...


@pytest.fixture
def initialisers(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(registry.INITIALISERS, "_targets", dict(registry.INITIALISERS._targets))
    return registry.INITIALISERS


@pytest.mark.parametrize(
    ("function", "says", "hint"),
    [
        (misspelt, "'grm'", "Did you mean 'gram'?"),
        (with_a_default, "'output_gramm'", "Did you mean 'output_gram'?"),
        (of_one_argument, "takes 1 arguments by position, and is given 2", "docs/plugins.md"),
    ],
)
def test_an_initialiser_that_names_what_nobody_gives_is_refused(
    initialisers: Registry, function: Any, says: str, hint: str
) -> None:
    line = function.__code__.co_firstlineno
    with pytest.raises(LillamaError) as caught:
        initialisers.add("mine", function)
    assert says in caught.value.what and f"the initialiser 'mine' ({__file__}:{line})" in caught.value.what
    assert hint in str(caught.value.hint)
    assert "mine" not in initialisers
    # As text it is imported where a recipe names it.
    initialisers.add("mine", f"{__name__}:{function.__name__}")
    data = {"model": {"id": "x"}, "compress": {"reduction": 0.5}, "calibration": {"dataset": "d"}, "run": {"out": "o"}}
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(data, ["compress.init=mine"])
    assert says in caught.value.what and f":{line}" in caught.value.what
    assert caught.value.where == "--set compress.init=mine"


@pytest.mark.parametrize(
    ("known", "function"),
    [
        (registry.INITIALISERS, lambda weight, r, *, gram, input_fisher=None: None),
        (registry.INITIALISERS, lambda *args, **kwargs: None),
        (registry.OBJECTIVES, lambda mine, original: None),
        (registry.LOSSES, lambda on_student, on_teacher: None),
        (registry.STRATEGIES, lambda layers, remove, compress, spectra: None),
        (registry.EVALUATORS, lambda model, context, *, anything=3: None),
    ],
)
def test_what_is_called_as_it_asks_may_be_added(
    known: Registry, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_targets", dict(known._targets))
    known.add("mine", function)
    assert known.get("mine") is function


@pytest.mark.parametrize(
    ("known", "function", "parameter"),
    [
        (registry.OBJECTIVES, lambda student, teacher, mask: None, "mask"),
        (registry.LOSSES, lambda on_teachr: None, "on_teachr"),
        (registry.STRATEGIES, lambda layers, remove, compress, *, spectrum: None, "spectrum"),
        (registry.EVALUATORS, lambda model, context, tokens: None, "tokens"),
    ],
)
def test_what_is_not_is_refused(known: Registry, function: Any, parameter: str) -> None:
    with pytest.raises(LillamaError, match=f"has a parameter '{parameter}', which nothing is given for"):
        known.add("mine", function)


def test_what_a_function_needs(initialisers: Registry) -> None:
    assert initialisers.needs("whitened") == {"W", "rank", "gram", "output_gram"}

    @functools.wraps(registry.INITIALISERS.get("svd"))
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    initialisers.add("wrapped", wrapped)
    assert initialisers.needs("wrapped") == {"W", "rank"}


def test_every_option_of_the_evaluators_is_described() -> None:
    for name in registry.EVALUATORS:
        schema = registry.EVALUATORS.options(name)
        assert schema.__doc__
        for option, field in schema.model_fields.items():
            assert field.description, f"{name}.{option} has no description"


def test_schemas_of_evaluators_import_nothing_heavy() -> None:
    code = (
        "import sys; from lillama import registry\n"
        "for name in registry.EVALUATORS: registry.EVALUATORS.options(name)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
