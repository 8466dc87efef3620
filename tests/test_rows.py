"""Rows from anywhere: files, folders, packages, the hub, and readers of plugins."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest

from lillama import registry
from lillama.data.rows import is_lines, load_rows, select_split
from lillama.errors import LillamaError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))


def load(dataset: Any, split: str = "train", config: str | None = None) -> list[dict[str, Any]]:
    return list(load_rows(str(dataset), config=config, split=split, where="calibration"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "one, two", "n": 1}, {"text": "three", "n": 2}]
    table = datasets.Dataset.from_list(rows)
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    table.to_parquet(tmp_path / "c.parquet")
    table.to_csv(tmp_path / "d.csv")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv", "e.jsonl.gz"):
        assert load(tmp_path / name) == rows, name


@pytest.mark.parametrize("name", ["a.txt", "a[1].txt", "a.txt.gz"])
def test_a_text_file_is_its_lines_and_joins_back(tmp_path: Path, name: str) -> None:
    text = "\nA title\n\nA paragraph,\nover two lines.\n\n\nThe end \u2028 of it"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    rows = load_rows(str(path), split="test", where="calibration")
    assert is_lines(rows)
    assert "\n".join(rows["text"]) == text
    some = load_rows(str(path), split="train[:1]+train[5:]", where="calibration")
    assert is_lines(some) and some["text"][:] == [*rows["text"][:1], *rows["text"][5:]]


@pytest.mark.parametrize("name", ["train", "test", "validation", "all", "train.100"])
def test_a_file_is_any_split_and_slices_apply(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    for cut, wanted in (("", range(10)), ("[:80%]", range(8)), ("[2:4]", range(2, 4)), ("[-3:]", range(7, 10))):
        assert [int(row["text"]) for row in load(path, f"{name}{cut}")] == list(wanted)
    assert len(load(path, "train+test")) == 10, "one file taken twice"


def test_a_folder_is_one_split_unless_its_files_are_named_after_several(tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    for i in range(2):
        write_rows(one / f"part{i}.jsonl", [{"text": f"{i}"}])
    (one / "README.md").write_text("not data")
    assert [row["text"] for row in load(one, "test")] == ["0", "1"]
    for split in ("train", "test", "validation"):
        write_rows(several / "english" / f"{split}-00000-of-00001.jsonl", [{"text": split}])
    assert load(several, "test", config="english") == [{"text": "test"}]
    assert load(several, "train.100") == [{"text": "train"}]
    assert len(load(several, "all")) == 3
    (several / "validation.jsonl").unlink(missing_ok=True)
    (several / "english" / "validation-00000-of-00001.jsonl").unlink()
    with pytest.raises(LillamaError, match="Known: test, train, all") as caught:
        load(several, "validation")
    assert caught.value.where == "calibration.split"


def test_an_audio_folder_is_its_manifest(tmp_path: Path) -> None:
    write_rows(tmp_path / "manifest.jsonl", [{"audio": "a.wav", "text": "hello"}])
    (tmp_path / "a.txt").write_text("hello")
    assert load(tmp_path) == [{"audio": "a.wav", "text": "hello"}]


def test_a_changed_file_is_read_again_even_if_its_time_stamp_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    before = path.stat()
    assert load(path) == [{"text": "old"}]
    path.write_text("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(path) == [{"text": "new"}]


def test_a_package_gives_its_largest_collection_in_a_fixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lillama_test_texts.py").write_text("names = ['x']\ntopics = {'b': 'second text', 'a': 'first text'}\n")
    (tmp_path / "lillama_test_none.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [row["text"] for row in load("package:lillama_test_texts")] == ["first text", "second text"]
    assert [row["text"] for row in load("package:lillama_test_texts", "test[1:]")] == ["second text"]
    for module, message in (
        ("lillama_test_none", "no dict"),
        ("lillama_test_absent", "cannot be imported"),
        ("", "cannot be imported"),
    ):
        with pytest.raises(LillamaError, match=message) as caught:
            load(f"package:{module}")
        assert caught.value.where == "calibration.dataset" and caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "split", "message", "where"),
    [
        ("absent.txt", None, "train", "there is no file", "dataset"),
        ("a.docx", "x", "train", "no kind of file", "dataset"),
        ("a.txt", "", "train", "is empty", "dataset"),
        ("a.jsonl", "\n", "train", "empty|cannot be read", "dataset"),
        ("a.jsonl", '{"text": 1}\n{bad\n', "train", "cannot be read as json", "dataset"),
        ("a.txt", "x", "train[:8", "not a split", "split"),
        ("a.txt", "x", "", "not a split", "split"),
        ("a.txt", "x", "train[:300%]", "not a split", "split"),
        ("a.txt", "x", "train[7:9]", "no rows", "split"),
    ],
)
def test_what_cannot_be_read_says_so(
    tmp_path: Path, name: str, content: str | None, split: str, message: str, where: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(LillamaError, match=message) as caught:
        load(path, split)
    assert caught.value.where == f"calibration.{where}" and caught.value.hint


def test_folders_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match="holds no file"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    write_rows(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(LillamaError, match=r"several kinds \(json, text\)"):
        load(tmp_path)
    with pytest.raises(LillamaError, match="there is no file"):
        load("missing.jsonl")  # looks like a file, so the hub is not asked
    with pytest.raises(LillamaError, match="there is no file"):
        load("./speech")


@pytest.mark.parametrize(
    ("error", "where", "wanted"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            "dataset",
            "not reachable.*--set calibration.dataset=FILE",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            "dataset",
            "no data set.*log in",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['clean', 'other']"), "config", "clean.*other"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['clean']"),
            "config",
            "Available: 'clean'",
        ),
        (ValueError("Unknown split \"x\". Should be one of ['train', 'test']."), "split", "'train', 'test'"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "dataset", "is a script"),
        (OSError("disk"), "dataset", "cannot be read: disk"),
    ],
)
def test_errors_of_the_hub_are_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, where: str, wanted: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(LillamaError, match=f"(?s){wanted}") as caught:
        load("a/b")
    assert caught.value.where == f"calibration.{where}"


def test_the_hub_is_asked_for_what_the_recipe_says_and_settings_are_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def answer(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options, datasets.are_progress_bars_disabled()))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    assert load("Salesforce/wikitext", "train[:1%]", "wikitext-2-raw-v1") == [{"text": "x"}]
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train[:1%]"}, True)]
    assert before == (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity())


def memory(dataset: str, config: str | None, split: str, where: str) -> datasets.Dataset | None:
    """A reader as a plugin would register it: memory:NAME."""
    if not dataset.startswith("memory:"):
        return None
    if dataset == "memory:broken":
        raise OSError("the cable\nis out")
    if dataset == "memory:unknown":
        raise LillamaError("there is no such memory")
    rows = datasets.Dataset.from_dict({"text": [f"{dataset} {config} {i}" for i in range(10)]})
    return select_split(split, lambda name: dataset, lambda source: rows, where)


def test_a_reader_from_outside_serves_its_own_names_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.READERS, "_targets", dict(registry.READERS._targets))
    registry.Registries.readers.add("memory", memory)
    assert load("memory:mine", "train[:2]", "a") == [{"text": "memory:mine a 0"}, {"text": "memory:mine a 1"}]
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    assert load(path) == [{"text": "x"}]
    for name, message in (
        ("broken", "the data reader 'memory' failed on 'memory:broken': OSError: the cable$"),
        ("unknown", "there is no such memory$"),
    ):
        with pytest.raises(LillamaError, match=message) as caught:
            load(f"memory:{name}")
        assert caught.value.where == "calibration.dataset"
    with pytest.raises(LillamaError, match="has no rows") as caught:
        load("memory:mine", "train[20:]")
    assert caught.value.where == "calibration.split"


def test_a_reader_from_outside_goes_before_those_that_take_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.READERS, "_targets", dict(registry.READERS._targets))
    asked: list[str] = []
    registry.READERS.add("zoo", lambda dataset, *_: asked.append(dataset))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["hub"]}))
    assert load("someone/some-data") == [{"text": "hub"}] and asked == ["someone/some-data"]
