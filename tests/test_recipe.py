"""Recipes: what is refused, how it is said, and that nothing is lost between file and object."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recipe_texts import DATA, MINIMAL, _no_plugins, refused, with_lines  # noqa: F401  # with a fixture for all tests

from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe


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
    hint = "Did you mean 'distill.learning_rate' or 'finetune.learning_rate' or 'quantize.learning_rate'?"
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
        "recipe:2: the key 'compress.reduction' is missing\n  Add it, or compress.size."
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


def test_what_the_command_line_changed_stands_above_the_text(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    plain = Recipe.load(file)
    changed = Recipe.load(file, ["compress.reduction=0.4", "calibration={dataset: b.txt,\n tokens: 512}"])
    assert plain.written == MINIMAL and changed.written.endswith("\n\n" + MINIMAL)
    assert "#   --set compress.reduction=0.4\n#   --set calibration={dataset: b.txt, tokens: 512}\n" in changed.written
    file.write_text(changed.written)
    assert Recipe.load(file) == plain, "comments are no settings"
    assert Recipe.parse(plain.model_dump(), ["run.out=x"]).written == ""
