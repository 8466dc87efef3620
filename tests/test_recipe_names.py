"""Overrides by `--set`, and the names in a recipe that stand for functions and plugins."""

from __future__ import annotations

import pytest
from recipe_texts import DATA, MINIMAL, _no_plugins, refused, with_lines  # noqa: F401  # with a fixture for all tests

from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compress.rank_multiple=some", "input should be 'auto' or a valid integer, not \"some\""),
        ("compress.rank_multiple=0", "input should be greater than or equal to 1, not 0"),
        ("calibration.filter={a: {}}", "input should be a valid string or a valid integer or a valid list, not {}"),
        ("calibration.filter={a: [{}]}", "input should be a valid string or a valid integer, not {}"),
        ("calibration.generate.temperature=hot", 'input should be a valid number or a valid list, not "hot"'),
        ("calibration.generate.temperature=[1, 0]", "input should be greater than 0, not 0"),
        ("calibration.generate.temperature=[]", "list should have at least 1 item after validation, not 0, not []"),
    ],
)
def test_a_value_that_may_be_given_in_several_ways_gets_one_complaint(override: str, message: str) -> None:
    assert str(refused(MINIMAL, override)).splitlines()[0] == f"--set {override}: {message}"


def test_a_complaint_about_one_of_several_ways_names_the_key_alone() -> None:
    text = MINIMAL.replace("dataset: text.txt", "dataset: text.txt\n  filter: {a: [b, {}]}")
    assert "calibration.filter.a.1: input" in str(refused(text))


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
