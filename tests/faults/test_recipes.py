"""What is said of recipes that are wrong: the word that was meant, and never a traceback."""

from __future__ import annotations

import importlib
import sys
import time
import tracemalloc

import mutate_recipes
import pytest
import typos

from lillama.errors import LillamaError, did_you_mean, distance
from lillama.recipe import yamlfile
from lillama.recipe.schema import Recipe
from lillama.run import sweepfile


def test_a_typo_of_one_edit_is_told_the_right_word():
    found = typos.measure(every=31)
    assert sum(found.all.values()) > 2000
    assert found.share >= 0.995, found.missed
    assert found.share_of_words >= 0.995, found.missed


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "ab", 2), ("of", "on", 1), ("ab", "ba", 1), ("decodr", "decoder", 1), ("kitten", "sitting", 3)],
)
def test_the_distance_of_two_words(a, b, edits):
    assert distance(a, b) == distance(b, a) == edits


def test_equally_near_words_are_all_named_and_far_ones_listed():
    assert did_you_mean("ion", ["of", "on", "in"]) == "Did you mean 'in' or 'on'?"
    assert did_you_mean("x", ["on", "of"]) == "Known: of, on."
    assert did_you_mean("x", ["y"]) == "Known: y."
    assert did_you_mean("z" * 10**6, ["storage"]) == "Known: storage."


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {k: [x, x, x, x, x, x, x, x]}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}, <<: *a{i - 1}}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (BOMB, 4, "more than 2000 values, those that aliases repeat included"),
        (MERGED, 4, "more than 2000 values"),
        ("x: " + "[" * 50_000, 1, "nested too deeply"),
        ("- " * 40_000, 1, "nested too deeply"),
        ("? " * 40_000, 1, "nested too deeply"),
        ("".join(f"b{i}: &b{i} [{f'*b{i - 1}' if i else 1}]\n" for i in range(60)), 29, "nested too deeply"),
        ("".join(f"key{i}: {i}\n" for i in range(5_000)), 1000, "more than 2000 values"),
        ("a: 1\n" + "# a comment that says nothing\n" * 9_000, 3335, "more than 100000 characters"),
        ("a: 1\nb: &b {c: {d: *b}}\n", 2, "the alias '*b' contains itself"),
        ("a: " + "9" * 90_000, 1, "a number of 90000 digits"),
        ('a: "\\ud800"', 1, "the character U+D800 is not allowed"),
        ('a: "\\0"', 1, "the character U+0000 is not allowed"),
        ("a: 1\nb: \0\n", 2, "the character U+0000 is not allowed"),
        ("a: 1\nb: \x07\n", 2, "the character U+0007 is not allowed"),
        ("a: 1\nb: !!float ''\n", 2, "cannot be read"),
    ],
)
@pytest.mark.parametrize("read", [Recipe.load, sweepfile.load])
def test_what_would_take_too_long_or_cannot_be_is_refused_by_its_line(text, line, words, read, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(LillamaError) as caught:
        read(path)
    assert time.process_time() - began < 0.4  # 0.1 by itself; machines of tests are busy
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)
    tracemalloc.start()
    with pytest.raises(LillamaError):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_what_set_gives_is_bounded_alike():
    for value in ("[" * 50_000, "{" + BOMB.replace("\n", ", ") + "}", "[&a [*a]]"):
        with pytest.raises(LillamaError, match=r"^--set compress.skip: "):
            Recipe.parse(typos.DATA, [f"compress.skip={value}"])
    with pytest.raises(LillamaError, match="has more than 30 levels"):
        Recipe.parse(typos.DATA, [f"evaluate.speed{'.a' * 5000}=1"])


def test_a_file_without_end_is_refused():
    with pytest.raises(LillamaError, match="more than 100000 characters"):
        Recipe.load("/dev/zero")
    with pytest.raises(LillamaError, match="cannot read the file"):
        Recipe.load("a\0b")


def test_aliases_and_merge_keys_of_a_usual_recipe_are_read():
    text = yamlfile.dump(typos.DATA) + (
        "evaluate:\n"
        "  perplexity/a: &text {dataset: &place ./text.txt, tokens: 100}\n"
        "  perplexity/b: {<<: *text, tokens: 200}\n"
        "  stable_rank: {dataset: *place}\n"
    )
    read = Recipe.parse(text).evaluate
    assert read["perplexity/b"] == {"dataset": "./text.txt", "tokens": 200}
    assert read["stable_rank"] == {"dataset": "./text.txt"}


def test_a_thousand_wrong_keys_are_told_in_short():
    began = time.process_time()
    with pytest.raises(LillamaError, match=r"and 880 more$") as caught:
        Recipe.parse({**typos.DATA, **{f"key{i}": i for i in range(900)}})
    assert time.process_time() - began < 1
    assert len(str(caught.value).splitlines()) < 50


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused_by_name(value):
    keys = [place.path for place in typos.places() if place.numeric]
    assert len(keys) > 60
    for key in keys:
        base = {"finetune": {}, **typos.DATA}
        with pytest.raises(LillamaError) as caught:
            Recipe.parse(base, [f"{key}={value}"])
        assert f"--set {key}={value}: " in str(caught.value), key


@pytest.mark.parametrize("value", [10**30, -(10**30), 1e300])
def test_a_whole_number_fits_into_64_bits(value):
    for key in (
        "calibration.tokens",
        "run.seed",
        "compress.min_rank",
        "evaluate.speed.repeats",
        "evaluate.speed.lengths",
    ):
        given = [value] if key.endswith("lengths") else value
        with pytest.raises(LillamaError, match=f"--set {key}="):
            Recipe.parse(typos.DATA, [f"{key}={given}"])


def test_a_text_from_python_has_no_nul():
    with pytest.raises(LillamaError, match=r"model\.id: a text without NUL"):
        Recipe.parse({**typos.DATA, "model": {"id": "a\0b"}})


def test_a_seed_is_one_that_every_generator_takes():
    for seed in (-1, 2**32):
        with pytest.raises(LillamaError, match=r"run.seed"):
            Recipe.parse(typos.DATA, [f"run.seed={seed}"])


def test_recipes_with_things_gone_wrong_are_refused_without_a_traceback():
    found = mutate_recipes.try_recipes(500, seed=2)
    assert found.tracebacks == []
    assert found.touched == []
    assert found.imports == []
    assert 20 < found.valid < 250
    assert found.slowest < 2


def test_what_the_mutations_look_for_would_be_found(monkeypatch, tmp_path):
    validate = mutate_recipes.validate

    def careless(path, overrides):
        validate(path, overrides)
        if path.name == "mutated.yaml":
            (tmp_path / "left").write_text("x")
            sys.modules.pop("this", None)
            importlib.import_module("this")
            raise ValueError

    monkeypatch.setattr(mutate_recipes, "validate", careless)
    monkeypatch.setattr(mutate_recipes, "mutated", lambda rng, text, data: text + b"\n# this")
    found = mutate_recipes.try_recipes(2)
    assert len(found.tracebacks) == len(found.touched) == 2
    assert found.imports


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b\nout: o\naxes:\n  run.seed: []\n", "s.yaml:4: axes.run.seed: the axis has no values"),
        (
            "base: b\nout: o\naxes:\n" + "".join(f"  a{i}: [1, 2, 3, 4]\n" for i in range(12)),
            "s.yaml:3: axes: the axes make 16,777,216 runs, more than 1,000",
        ),
        ("base: b\nouts: o\naxes:\n  run.seed: [1]\n", "unknown key 'outs'\n  Did you mean 'out'?"),
    ],
)
def test_a_sweep_that_nobody_would_wait_for_is_refused(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(LillamaError) as caught:
        sweepfile.load(tmp_path / "s.yaml")
    assert message in str(caught.value)


def test_a_run_of_a_sweep_has_a_name_that_can_be_a_folder(tmp_path):
    (tmp_path / "s.yaml").write_text(f"base: b\nout: o\naxes:\n  evaluate.sample.prompt: [{'long ' * 60}]\n")
    found, _ = sweepfile.load(tmp_path / "s.yaml")
    with pytest.raises(LillamaError, match="name is too long"):
        list(sweepfile.rows(found))


def test_the_base_of_a_sweep_may_have_any_name(tmp_path):
    (tmp_path / "s.yaml").write_text(f"base: {'b' * 3000}\nout: o\naxes:\n  run.seed: [1]\n")
    assert sweepfile.load(tmp_path / "s.yaml")[1].name == "b" * 3000
