"""YAML as people expect it, and errors that point at the line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lillama.errors import LillamaError
from lillama.recipe import yamlfile

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
WORDS = (
    "no",
    "yes",
    "on",
    "off",
    "null",
    "~",
    "true",
    "1e-4",
    "1e5",
    "08",
    "1_0",
    "2024-01-01",
    "<<",
    "=",
    "12:30",
)


def read(text: str) -> Any:
    return yamlfile.Document(text, "r.yaml").data


def error(text: str) -> LillamaError:
    with pytest.raises(LillamaError) as caught:
        read(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("8.6e-4", 8.6e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("+7", 7),
        ("65_536", 65536),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("v1.0", "v1.0"),
        ("True", True),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars(text: str, expected: object) -> None:
    value = read(f"key: {text}")["key"]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("word", ["no", "No", "yes", "on", "OFF", "y", "n"])
def test_words_stay_words(word: str) -> None:
    assert read(word) == word


@given(st.integers())
def test_integers_as_python_writes_them(number: int) -> None:
    value = read(str(number))
    assert value == number
    assert type(value) is int


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_as_python_writes_them(number: float) -> None:
    value = read(repr(number))
    assert value == number
    assert type(value) is float


@given(st.one_of(st.integers().map(str), st.floats().map(repr), st.sampled_from(WORDS)))
def test_quotes_make_text(text: str) -> None:
    assert read(f'"{text}"') == text
    assert read(f"'{text}'") == text


@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.text(CHARACTERS),
            st.sampled_from(WORDS),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(st.text(CHARACTERS), st.sampled_from(WORDS)), inner, max_size=4),
        ),
        max_leaves=8,
    )
)
def test_dump_reads_back(data: Any) -> None:
    def tree(value: Any) -> Any:  # True == 1 == 1.0, so types are compared as well
        if isinstance(value, dict):
            return {key: tree(item) for key, item in value.items()}
        return [tree(item) for item in value] if isinstance(value, list) else (type(value), value)

    assert tree(read(yamlfile.dump(data))) == tree(data)


@pytest.mark.parametrize("word", ["1e-4", "08", "no", "true", "null", "1_0"])
def test_dump_quotes_for_readers_of_both_versions(word: str) -> None:
    assert yaml.safe_load(yamlfile.dump({"key": word})) == {"key": word}
    assert read(yamlfile.dump({"key": word})) == {"key": word}


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a", 1),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", 4, "b", 2),
        ("a:\n- {x: 1}\n- {y: 1,\n   y: 2}\n", 4, "y", 3),
        ("a: 1\n'a': 2\n", 2, "a", 1),
        ("base: &b {x: 1, x: 2}\nc: {<<: *b}\n", 1, "x", 1),
    ],
)
def test_duplicate_keys_name_both_lines(text: str, line: int, key: str, first: int) -> None:
    caught = error(text)
    assert caught.where == f"r.yaml:{line}"
    assert f"'{key}' is given twice (first on line {first})" in caught.what


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "r.yaml:3", "flow sequence"),
        ("a: 1\n\tb: 2\n", "r.yaml:2", "\\t"),
        ("a:\n  - 1\n b: 2\n", "r.yaml:3", "block mapping"),
        ("a: *nowhere\n", "r.yaml:1", "nowhere"),
        ("a: %x\n", "r.yaml:1", "%"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2", "single document"),
        ("a: !!python/object:os.system x\n", "r.yaml:1", "python/object"),
        ("a: !!timestamp x\n", "r.yaml:1", "timestamp"),
        ("? [a, b]\n: 1\n", "r.yaml:1", "a key must be a word"),
        ("? {a: b}\n: 1\n", "r.yaml:1", "a key must be a word"),
        ("a: !!int x\n", "r.yaml:1", "cannot be read"),
        ("a: !!bool maybe\n", "r.yaml:1", "maybe"),
        ("a: \x07\n", "r.yaml:1", "U+0007"),
        ("a: &a [*a]\n", "r.yaml:1", "contains itself"),
        ("a: &a\n  b: *a\n", "r.yaml:2", "contains itself"),
        ("a: &a\n  <<: *a\n", "r.yaml:2", "contains itself"),
        ("[" * 5000, "r.yaml:1", "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_explained(text: str, where: str, words: str) -> None:
    caught = error(text)
    assert caught.where == where
    assert words in caught.what


def test_where_points_at_the_line_of_the_deepest_known_part() -> None:
    document = yamlfile.Document("a:\n  b:\n    - 1\n    - c: 2\n", "r.yaml")
    assert document.where(("a",)) == "r.yaml:1"
    assert document.where(("a", "b", 1, "c")) == "r.yaml:4"
    assert document.where(("a", "b", 0, "x")) == "r.yaml:3"
    assert document.where(("z",)) == "r.yaml"
    assert document.where(()) == "r.yaml"
    assert document.holds(("a", "b"))
    assert not document.holds(("a", "z"))


def test_anchors_and_merge_keys() -> None:
    text = "base: &base\n  x: 1\n  y: 2\na:\n  <<: *base\n  y: 3\nb: *base\nc:\n  <<: [{x: 5}, *base]\n"
    document = yamlfile.Document(text, "r.yaml")
    assert document.data["a"] == {"x": 1, "y": 3}
    assert document.data["b"] == {"x": 1, "y": 2}
    assert document.data["c"] == {"x": 5, "y": 2}
    assert document.where(("a", "x")) == "r.yaml:2"
    assert document.where(("a", "y")) == "r.yaml:6"
    assert document.where(("b", "y")) == "r.yaml:3"
    assert document.where(("c", "x")) == "r.yaml:9"


def test_one_anchor_merged_and_used_whole() -> None:
    document = yamlfile.Document("base: &b {x: 1}\na:\n  <<: *b\n  z: *b\n", "r.yaml")
    assert document.data["a"] == {"x": 1, "z": {"x": 1}}
    assert document.where(("a", "z")) == "r.yaml:4"


def test_files_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: caf\xc3\xa9\r\n")
    document = yamlfile.load(path)
    assert document.data == {"a": 1, "b": "café"}
    assert document.where(("b",)) == f"{path}:2"


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(LillamaError, match="No such file") as caught:
        yamlfile.load(path)
    assert caught.value.where == str(path)
    with pytest.raises(LillamaError, match="directory"):
        yamlfile.load(tmp_path)
    path.write_bytes("a: café".encode("latin-1"))
    with pytest.raises(LillamaError, match="not UTF-8") as caught:
        yamlfile.load(path)
    assert caught.value.where == str(path)
    path.write_text("a: 1", encoding="utf-16")
    with pytest.raises(LillamaError, match="not UTF-8"):
        yamlfile.load(path)


def test_empty_file_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# nothing yet\n")
    assert yamlfile.load(path).data is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("1e-3", 1e-3),
        ("[a, 2]", ["a", 2]),
        ("{a: 1}", {"a": 1}),
        ("'1'", "1"),
        ("train[:80%]", "train[:80%]"),
    ],
)
def test_one_value(text: str, expected: object) -> None:
    assert yamlfile.value(text, "--set x") == expected


def test_a_value_that_is_not_yaml_has_no_line() -> None:
    with pytest.raises(LillamaError, match="not valid YAML") as caught:
        yamlfile.value("[*.q_proj]", "--set compress.skip")
    assert caught.value.where == "--set compress.skip"
    assert "quotes" in str(caught.value.hint)
