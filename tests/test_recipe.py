"""Recipes: what is refused, how it is said, and that nothing is lost between file and object."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from lillama import host, registry
from lillama.errors import LillamaError
from lillama.recipe import explain as recipecheck
from lillama.recipe import reference
from lillama.recipe.schema import Recipe

MINIMAL = """\
model: {id: some/model}
compress:
  reduction: 0.3
calibration:
  dataset: text.txt
run:
  out: runs/x
"""
DATA: dict[str, Any] = {
    "model": {"id": "some/model"},
    "compress": {"reduction": 0.3},
    "calibration": {"dataset": "text.txt"},
    "run": {"out": "runs/x"},
}


def measure(
    model: Any,
    *,
    dataset: Annotated[str, Field(description="Text.")] = "d",
    tokens: Annotated[int | None, Field(description="Tokens.")] = None,
    lengths: Annotated[tuple[int, ...], Field(description="Lengths.")] = (1,),
) -> dict[str, float]:
    """A stand-in for an evaluator."""
    return {}


@pytest.fixture(autouse=True, scope="module")
def _no_plugins() -> Iterator[None]:
    """No installed plugin has a say, and there is an evaluator `measure`."""
    alone = host.Host(entry_points=[], only=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "get", lambda: alone)
        registry.discover_again()
        patch.setattr(registry.EVALUATORS, "_targets", {**registry.EVALUATORS._targets, "measure": measure})
        yield
    registry.discover_again()


def refused(text: str | dict[str, Any], *overrides: str) -> LillamaError:
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(text, overrides)
    return caught.value


def with_lines(*lines: str) -> str:
    return MINIMAL + "\n".join(lines)


# Keys


def test_the_least_recipe() -> None:
    plain = Recipe.parse(MINIMAL)
    assert plain.compress.reduction == 0.3
    assert plain.distill.learning_rate == 8.6e-4
    assert plain.evaluate == {}
    assert plain == Recipe.parse(DATA)


def test_unknown_key_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(with_lines("evalute: {}"))
    with pytest.raises(LillamaError) as caught:
        Recipe.load(path)
    assert str(caught.value) == f"{path}:8: evalute: unknown key 'evalute'\n  Did you mean 'evaluate'?"


def test_unknown_key_below(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("  reduction: 0.3\n", "  reduction: 0.3\n  strategie: top\n"))
    with pytest.raises(LillamaError) as caught:
        Recipe.load(path)
    assert str(caught.value) == (f"{path}:4: compress.strategie: unknown key 'strategie'\n  Did you mean 'strategy'?")


def test_a_key_of_another_section_is_sent_there() -> None:
    hint = "Did you mean 'distill.learning_rate' or 'finetune.learning_rate'?"
    assert refused(with_lines("learning_rate: 1e-4")).hint == hint
    assert refused(with_lines("distill: {out: x}")).hint == "Did you mean 'run.out'?"


def test_a_key_like_nothing_lists_what_there_is() -> None:
    hint = str(refused(MINIMAL.replace("out: runs/x", "out: x\n  zzz: 1")).hint)
    assert hint.startswith("Known: ")
    assert "snapshot_seconds" in hint


def test_every_error_is_told_at_once() -> None:
    text = MINIMAL.replace("reduction: 0.3", "reduction: 2\n  min_rank: abc\n  intit: svd").replace(
        "  out: runs/x\n", ""
    )
    message = str(refused(with_lines("sed: 1").replace(MINIMAL, text)))
    assert "recipe:3: compress.reduction: input should be less than 1, not 2" in message
    assert 'recipe:4: compress.min_rank: input should be a valid integer, not "abc"' in message
    assert "recipe:5: compress.intit: unknown key 'intit'\n  Did you mean 'init'?" in message
    assert "the key 'run.out' is missing" in message
    assert "unknown key 'sed'" in message


def test_missing_keys() -> None:
    assert str(refused(MINIMAL.replace("reduction: 0.3", "skip: []"))) == (
        "recipe:2: the key 'compress.reduction' is missing\n  Add it."
    )
    assert "recipe: the key 'run' is missing" in str(refused(MINIMAL.replace("run:\n  out: runs/x\n", "")))
    assert "recipe:1: the key 'model.id' is missing" in str(refused(MINIMAL.replace("{id: some/model}", "")))


def test_keys_that_are_not_text() -> None:
    assert "unknown key '1'" in str(refused(with_lines("1: 2")))
    assert refused({**DATA, 1: 2}).what == "unknown key '1'"  # type: ignore[dict-item]


def test_the_line_of_a_merged_key() -> None:
    text = "evaluate:\n  measure/a: &common\n    dataset: d\n    token: 3\n  measure/b: {<<: *common}\n"
    message = str(refused(with_lines(*text.splitlines())))
    assert message.count("recipe:11: ") == 2
    assert "evaluate.measure/b.token: unknown key 'token'\n  Did you mean 'tokens'?" in message


# Types


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("distill", "epochs: abc", 'recipe:9: distill.epochs: input should be a valid integer, not "abc"'),
        ("distill", 'epochs: "3"', 'input should be a valid integer, not "3"'),
        ("distill", "epochs: 1.5", "input should be a valid integer, not 1.5"),
        ("distill", "epochs: true", "input should be a valid integer, not true"),
        ("distill", "epochs: -1", "input should be greater than or equal to 0, not -1"),
        ("distill", "epochs: null", "input should be a valid integer, not null"),
        ("distill", 'learning_rate: "1e-4"', 'input should be a valid number, not "1e-4"'),
        ("distill", "learning_rate: .inf", "input should be a finite number"),
        ("distill", "learning_rate: .nan", "finite number"),
        ("distill", "schedule: both", "no schedule is called 'both'\n  Known: concurrent, sequential."),
        ("distill", "loss: 3", "input should be a valid string, not 3\n  Put it in quotes."),
        ("distill", "loss: [a]", 'input should be a valid string, not ["a"]'),
        ("distill", "- 3", "recipe:8: distill: input should be a mapping of keys to values, not [3]"),
        ("finetune", "epochs: 0", "finetune.epochs: input should be greater than or equal to 1, not 0"),
        ("finetune", "learning_rat: 1", "Did you mean 'learning_rate'?"),
        (
            "evaluate",
            "speed: false",
            "recipe:9: evaluate.speed: input should be a mapping of keys to values, not false",
        ),
        ("evaluate", "- speed", "recipe:8: evaluate: input should be a mapping of keys to values"),
    ],
)
def test_wrong_values_read_well(section: str, line: str, message: str) -> None:
    assert message in str(refused(with_lines(f"{section}:", f"  {line}")))


@pytest.mark.parametrize("word", ["no", "yes", "off", "0", '"true"'])
def test_only_true_and_false_are_booleans(word: str) -> None:
    message = str(refused(MINIMAL.replace("}", f", trust_remote_code: {word}}}")))
    assert "recipe:1: model.trust_remote_code: input should be a valid boolean" in message
    assert "Write true or false." in message


def test_words_and_numbers_of_yaml() -> None:
    text = MINIMAL.replace("id: some/model", "id: no, revision: '1e5'").replace(
        "dataset: text.txt", "dataset: on\n  tokens: 1e6"
    )
    read = Recipe.parse(with_lines("distill: {learning_rate: 1e-4, weight_decay: 0}"))
    assert read.distill.learning_rate == 1e-4
    assert type(read.distill.weight_decay) is float
    read = Recipe.parse(text)
    assert (read.model.id, read.model.revision, read.calibration.dataset) == ("no", "1e5", "on")
    assert read.calibration.tokens == 1_000_000
    assert "Put it in quotes" in str(refused(MINIMAL.replace("id: some/model", "id: x, revision: 1234567")))


def test_a_list_is_not_made_of_a_word() -> None:
    message = str(refused(MINIMAL.replace("reduction: 0.3", "reduction: 0.3\n  skip: lm_head")))
    assert "recipe:4: compress.skip" in message
    assert "Write a list" in message


def test_long_values_are_cut() -> None:
    assert len(str(refused(with_lines(f"distill: {list(range(1000))}")))) < 200


def test_headings_with_nothing_below_are_defaults() -> None:
    read = Recipe.parse(with_lines("distill:", "  # epochs: 3", "evaluate:"))
    assert read == Recipe.parse(MINIMAL)
    assert Recipe.parse(with_lines("evaluate:", "  speed: ", "  measure/x:")).evaluate == {"speed": {}, "measure/x": {}}


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.yaml: the recipe is empty"),
        (b"# only a comment\n", "r.yaml: the recipe is empty"),
        (b"- a\n- b\n", "r.yaml: a recipe is a mapping"),
        (b"just words", "r.yaml: a recipe is a mapping"),
        (b"model: {id: x\nrun: {}\n", "r.yaml:2: not valid YAML"),
        (b"model:\n\tid: x\n", "r.yaml:2: not valid YAML"),
        (b"model: {id: x}\nrun:\n  out: a\n  out: b\n", "r.yaml:4: the key 'out' is given twice (first on line 3)"),
        (b"model: {id: x}\nrun: {}\nmodel: {id: y}\n", "r.yaml:3: the key 'model' is given twice (first on line 1)"),
        (b"model: {id: caf\xe9}", "r.yaml: the file is not UTF-8"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(LillamaError, match=re.escape(message)):
        Recipe.load(tmp_path / "r.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match="No such file") as caught:
        Recipe.load(tmp_path / "absent.yaml")
    assert caught.value.where == str(tmp_path / "absent.yaml")


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 1e-3), ("1", 1.0), ("null", None), ("", None), ("~", None)],
)
def test_set_is_typed_as_yaml(text: str, expected: float | None) -> None:
    assert Recipe.parse(MINIMAL, [f"distill.clip_norm={text}"]).distill.clip_norm == expected


def test_set_takes_lists_mappings_and_equals_signs() -> None:
    overrides = ["compress.skip=['*.down_proj', lm_head]", "evaluate={speed: {repeats: 2}}", "run.out=a=b"]
    read = Recipe.parse(MINIMAL, [*overrides, "calibration.split=train[:80%]"])
    assert read.compress.skip == ["*.down_proj", "lm_head"]
    assert read.evaluate == {"speed": {"repeats": 2}}
    assert read.run.out == "a=b"
    assert read.calibration.split == "train[:80%]"


def test_set_creates_sections_and_later_ones_win() -> None:
    overrides = ["evaluate.measure/mine.dataset=./x", "distill.epochs=2", "distill.epochs=3"]
    read = Recipe.parse(with_lines("distill:"), overrides)
    assert read.evaluate == {"measure/mine": {"dataset": "./x"}}
    assert read.distill.epochs == 3
    assert Recipe.parse("{}", ["model.id=x", "compress.reduction=.5", "calibration.dataset=d", "run.out=o"])


def test_set_leaves_the_given_data_alone() -> None:
    data = {**DATA, "compress": {"reduction": 0.3}}
    Recipe.parse(data, ["compress.reduction=0.5"])
    assert data["compress"] == {"reduction": 0.3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.epoch=3", "--set distill.epoch=3: unknown key 'epoch'\n  Did you mean 'epochs'?"),
        ("distil.epochs=3", "--set distil.epochs=3: unknown key 'distil'\n  Did you mean 'distill'?"),
        ("distill.epochs=x", '--set distill.epochs=x: input should be a valid integer, not "x"'),
        ("distill={epoch: 3}", "--set distill={epoch: 3}: unknown key 'epoch'\n  Did you mean 'epochs'?"),
        ("compress.strategy=unform", "--set compress.strategy=unform: no strategy is called 'unform'"),
        ("evaluate.measure.token=3", "--set evaluate.measure.token=3: unknown key 'token'\n  Did you mean 'tokens'?"),
        ("evaluate.mesure.tokens=3", "--set evaluate.mesure.tokens=3: no evaluator is called 'mesure'"),
        ("run.out=", "--set run.out=: input should be a valid string, not null"),
        ("compress.skip=[*.q]", "--set compress.skip: not valid YAML"),
        ("compress.skip.0=x", "--set compress.skip.0=x: 'compress.skip' has no keys below it"),
        ("model.id.x=1", "--set model.id.x=1: 'model.id' has no keys below it"),
        ("distill.epochs", "--set: 'distill.epochs' is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("a..b=3", "is not KEY=VALUE"),
    ],
)
def test_a_wrong_set_is_named(override: str, message: str) -> None:
    text = MINIMAL.replace("reduction: 0.3", "reduction: 0.3\n  skip: [a]")
    assert message in str(refused(text, override))


# Names


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("plugin: decodr",), "recipe:8: plugin: no plugin is called 'decodr'"),
        (
            ("distill:", "  loss: teachr"),
            "recipe:9: distill.loss: no loss is called 'teachr'\n  Did you mean 'teacher'?",
        ),
        (("distill:", "  objective: l1_logcs"), "recipe:9: distill.objective: no objective is called 'l1_logcs'"),
        (
            ("evaluate:", "  sped: {}"),
            "recipe:9: evaluate.sped: no evaluator is called 'sped'\n  Did you mean 'speed'?",
        ),
        (
            ("evaluate:", "  measure/x:", "    datset: d"),
            "recipe:10: evaluate.measure/x.datset: unknown key 'datset'\n  Did you mean 'dataset'?",
        ),
        (
            ("evaluate:", "  measure:", "    tokens: many"),
            'recipe:10: evaluate.measure.tokens: input should be a valid integer, not "many"',
        ),
    ],
)
def test_unknown_names_and_options(lines: tuple[str, ...], message: str) -> None:
    assert message in str(refused(with_lines(*lines)))


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [("strategy", "buttom", "bottom"), ("init", "whitend", "whitened"), ("init", "SVD", "svd")],
)
def test_unknown_ways_to_compress(key: str, wrong: str, right: str) -> None:
    message = str(refused(MINIMAL.replace("reduction: 0.3", f"reduction: 0.3\n  {key}: {wrong}")))
    assert f"recipe:4: compress.{key}: no " in message
    assert f"Did you mean '{right}'?" in message


def test_every_unknown_name_is_told_at_once() -> None:
    message = str(refused(MINIMAL, "compress.init=x", "distill.loss=y", "evaluate={measure: {a: 1, b: 2}}"))
    for words in ("called 'x'", "called 'y'", "key 'a'", "key 'b'"):
        assert words in message


def test_options_of_evaluators_are_typed() -> None:
    read = Recipe.parse(with_lines("evaluate: {measure: {tokens: 1e3, lengths: [4]}}"))
    assert read.evaluate == {"measure": {"tokens": 1000, "lengths": (4,)}}


def test_the_nearest_key_of_a_section_within_a_section_is_named() -> None:
    with pytest.raises(LillamaError, match=r"unknown key 'rnak'\n  Did you mean 'rank'"):
        Recipe.parse(with_lines("finetune: {lora: {rnak: 4}}"))


# Objects


def sections() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [Recipe]
    for section in found:  # those inside of sections are added on the way
        found += [inner for field in section.model_fields.values() if (inner := recipecheck.section_of(field))]
    return found


def test_every_field_is_described() -> None:
    assert len(sections()) == 8
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


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
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
                "min_rank": st.integers(min_value=1),
                "storage": st.sampled_from(["factors", "pivoted"]),
                "skip": st.lists(WORDS, max_size=3),
            },
        ),
        "calibration": st.fixed_dictionaries(
            {"dataset": WORDS}, optional={"tokens": st.none() | st.integers(min_value=1), "column": st.none() | WORDS}
        ),
        "run": st.fixed_dictionaries({"out": WORDS}, optional={"seed": st.integers()}),
    },
    optional={
        "distill": st.none()
        | st.fixed_dictionaries({}, optional={"learning_rate": POSITIVE, "clip_norm": st.none() | POSITIVE}),
        "evaluate": st.dictionaries(
            WORDS.map(lambda label: f"measure/{label}"),
            st.none() | st.fixed_dictionaries({}, optional={"dataset": WORDS, "lengths": st.lists(st.integers())}),
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
