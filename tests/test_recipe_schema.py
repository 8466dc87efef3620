"""The recipe's fields, its JSON schema, and what is written and read again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from recipe_texts import DATA, MINIMAL, _no_plugins, refused, with_lines  # noqa: F401  # with a fixture for all tests

from lillama import registry
from lillama.recipe import explain as recipecheck
from lillama.recipe import reference
from lillama.recipe.schema import Recipe


def sections() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [Recipe]
    for section in found:  # those inside of sections are added on the way
        found += [inner for field in section.model_fields.values() if (inner := recipecheck.section_of(field))]
    return found


def test_every_field_is_described() -> None:
    assert len(sections()) == 13
    for section in sections():
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
            assert field.description.endswith("."), f"{section.__name__}.{name}"


def test_recipes_are_frozen() -> None:
    read = Recipe.parse(MINIMAL)
    for section in (read, read.model, read.compress, read.distill, read.calibration, read.run):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


def test_data_with_paths_and_tuples(tmp_path: Path) -> None:
    data = {
        **DATA,
        "model": {"id": tmp_path},
        "compress": {"reduction": 0.3, "skip": ("a", "b")},
        "evaluate": {"measure": {"dataset": tmp_path / "x.txt"}},
    }
    read = Recipe.parse(data)
    assert read.model.id == str(tmp_path)
    assert read.compress.skip == ["a", "b"]
    assert read.evaluate["measure"]["dataset"] == str(tmp_path / "x.txt")
    assert Recipe.parse(read.to_yaml()) == read


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
WHOLE = st.integers(-(2**63) + 1, 2**63 - 1)
COUNT = st.integers(1, 2**63 - 1)
WORDS = st.one_of(TEXT, st.sampled_from(["no", "1e5", "08", "null", "~", "2024-01-01", "1_0", " x ", "a: b", "#"]))
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"id": WORDS},
            optional={
                "revision": st.none() | WORDS,
                "dtype": st.sampled_from(["auto", "float32"]),
                "trust_remote_code": st.booleans(),
            },
        ),
        "compress": st.fixed_dictionaries(
            {"reduction": st.floats(0, 1, exclude_min=True, exclude_max=True)},
            optional={
                "strategy": st.sampled_from(list(registry.STRATEGIES)),
                "min_rank": COUNT,
                "storage": st.sampled_from(["factors", "pivoted"]),
                "skip": st.lists(WORDS, max_size=3),
            },
        ),
        "calibration": st.fixed_dictionaries(
            {"dataset": WORDS}, optional={"tokens": st.none() | COUNT, "column": st.none() | WORDS}
        ),
        "run": st.fixed_dictionaries({"out": WORDS}, optional={"seed": st.integers(0, 2**32 - 1)}),
    },
    optional={
        "distill": st.none()
        | st.fixed_dictionaries({}, optional={"learning_rate": POSITIVE, "clip_norm": st.none() | POSITIVE}),
        "evaluate": st.dictionaries(
            WORDS.map(lambda label: f"measure/{label}"),
            st.none() | st.fixed_dictionaries({}, optional={"dataset": WORDS, "lengths": st.lists(WHOLE)}),
            max_size=2,
        ),
    },
)


@given(RECIPES)
def test_what_is_written_reads_back_equal(data: dict[str, Any]) -> None:
    first = Recipe.parse(data)
    assert Recipe.parse(first.to_yaml()) == first
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(first.to_yaml(), encoding="utf-8")
        again = Recipe.load(path)
    assert again == first
    assert again.model_dump() == first.model_dump()


# The schema


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from nodes(child)


def test_the_json_schema() -> None:
    schema = reference.schema()
    assert json.loads(json.dumps(schema)) == schema
    for node in nodes(schema):
        if "$ref" in node:
            target = schema
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
        if isinstance(node.get("type"), str):
            assert node["type"] in {"object", "array", "string", "number", "integer", "boolean", "null"}
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "compress", "calibration", "run"}
    assert set(schema["$defs"]["Compress"]["properties"]["strategy"]["enum"]) == set(registry.STRATEGIES)
    assert schema["$defs"]["Distill"]["properties"]["schedule"]["enum"] == ["concurrent", "sequential"]
    evaluators = schema["properties"]["evaluate"]
    assert set(evaluators["properties"]) == set(registry.EVALUATORS)
    options = evaluators["properties"]["measure"]["anyOf"][0]
    assert set(options["properties"]) == {"dataset", "tokens", "lengths"}
    assert any(re.search(pattern, "measure/x") for pattern in evaluators["patternProperties"])


def test_validation_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(with_lines("evaluate: {speed: }"))
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from lillama.recipe.schema import Recipe; Recipe.load(sys.argv[1])\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "print(sorted(heavy), seconds < 3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], capture_output=True, text=True)
    assert done.stdout.strip() == "[] True", done.stderr
