"""Registries: names, lazy targets, and schemas made from signatures."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from lillama import registry
from lillama.errors import LillamaError
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


@pytest.mark.parametrize(
    "builtin",
    [registry.STRATEGIES, registry.INITIALISERS, registry.OBJECTIVES, registry.LOSSES, registry.EVALUATORS],
    ids=lambda builtin: builtin.kind,
)
def test_every_builtin_name_leads_to_a_function(builtin: Registry) -> None:
    for name in builtin:
        assert callable(builtin.get(name))


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
