"""Streams spill by budget, come back as they were, and let a killed run skip the layers it finished."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama import LillamaError
from lillama.base.tensorfile import Entry, TensorFile, write
from lillama.pretrained.source import Source
from lillama.pretrained.streams import Shelf, Stream, budgets, choose
from lillama.run import pipeline
from lillama.run.prepare import open_source
from lillama.testing import recipe_for, token_batches

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@pytest.mark.parametrize("place", ["device", "host", "file"])
@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from(DTYPES)), min_size=1, max_size=5))
def test_a_stream_gives_back_what_it_was_given(tmp_path_factory, place, shapes):
    tensors = [(torch.randn(a, b) * 3).to(dtype) for a, b, dtype in shapes]
    stream = Stream(place, CPU, tmp_path_factory.mktemp("s") / "x.bin")
    for tensor in tensors:
        stream.append(tensor)
    assert len(stream) == len(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stream, tensors))
    assert torch.equal(stream[len(tensors) - 1], tensors[-1])  # out of order
    path = stream.path
    stream.drop()
    assert not path.exists()


def test_the_first_place_with_room_is_taken():
    assert [choose(n, 10, 20) for n in (10, 11, 20, 21)] == ["device", "host", "host", "file"]
    assert budgets("auto", 0.5, CPU) == (0, 2**29)
    assert budgets("auto", "auto", CPU)[1] > 0
    with pytest.raises(LillamaError, match="stream_memory"):
        recipe_for("m", "o", changes={"run.stream_memory": -1.0})


def test_only_whole_files_are_taken_up_again(tmp_path):
    shelf = Shelf(tmp_path / "streams", CPU, "file")
    assert shelf.marked() is None
    stream = shelf.new("a")
    stream.append(torch.ones(3, 4, dtype=torch.bfloat16))
    shelf.mark(2, {"teacher": stream, "student": stream})
    position, found = shelf.marked()
    assert position == 2
    assert found["teacher"] is found["student"]  # still one stream
    assert torch.equal(found["student"][0], stream[0])
    with stream.path.open("ab") as handle:
        handle.write(b"x")
    assert shelf.marked() is None
    (tmp_path / "streams" / "boundary.json").write_text("{")
    assert shelf.marked() is None
    shelf.clear()
    assert not (tmp_path / "streams").exists()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


def run(original, out, **changes):
    settings = {"distill.epochs": 2, **{k.replace("__", "."): v for k, v in changes.items()}}
    return pipeline.compress(recipe_for(original, out, changes=settings), batches=token_batches(tiny(), batches=6))


def weights(result):
    file = TensorFile(result.path / "model.safetensors")
    return {key: file.read(key) for key in file}


def test_where_streams_are_kept_changes_nothing(original, tmp_path):
    for schedule in ("sequential", "concurrent"):
        memory = weights(run(original, tmp_path / f"{schedule}-m", distill__schedule=schedule))
        out = tmp_path / f"{schedule}-f"
        files = weights(run(original, out, distill__schedule=schedule, run__stream_memory=0.0))
        assert memory.keys() == files.keys()
        assert all(torch.equal(memory[key], files[key]) for key in memory)
        assert not (out / "streams").exists()
        assert not list(out.glob("init/*"))
        manifest = json.loads((out / "MANIFEST.json").read_text())["files"]
        assert not any(name.startswith(("streams", "init")) for name in manifest)


def test_a_resumed_run_reads_no_finished_layer_again(original, tmp_path, monkeypatch):
    whole = weights(run(original, tmp_path / "whole", run__stream_memory=0.0))
    real, count = Shelf.mark, []

    def stop_after_two(self, position, streams):
        real(self, position, streams)
        count.append(position)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shelf, "mark", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(original, tmp_path / "broken", run__stream_memory=0.0)
    monkeypatch.undo()
    read = []
    materialise = Source.materialise
    monkeypatch.setattr(
        Source, "materialise", lambda self, names, *a: (read.extend(names), materialise(self, names, *a))[1]
    )
    learn = pipeline.learn_forms

    def learned(*arguments):
        learn(*arguments)
        read.clear()  # how layers are driven is seen on two rows of the first batch, in every process anew

    monkeypatch.setattr(pipeline, "learn_forms", learned)
    again = weights(run(original, tmp_path / "broken", run__stream_memory=0.0))
    assert "model.layers.2" in read
    assert not {"model.layers.0", "model.layers.1"} & set(read)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_next_layer_is_read_ahead_without_harm(original, tmp_path):
    source = open_source(recipe_for(original, tmp_path))
    source.fetch(tmp_path)
    source.prefetch(["model.layers.1"])
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join()
    assert all(p.is_meta for p in source.model.parameters())
    source.materialise(["model.layers.1"])
    expected = tiny().model.layers[1].mlp.up_proj.weight
    assert torch.equal(source.model.model.layers[1].mlp.up_proj.weight, expected)


def test_files_are_safetensors_and_damage_is_named(tmp_path):
    from safetensors.torch import load_file

    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.arange(4), "none": torch.empty(0), "s": torch.tensor(2.5)}
    path = tmp_path / "x.safetensors"
    write(path, [Entry.of(*item) for item in tensors.items()], {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], t) and torch.equal(TensorFile(path).read(k), t) for k, t in tensors.items())
    entry = TensorFile(path).entry("b", torch.float32, "c")
    assert (entry.name, entry.bytes, entry.read().dtype) == ("c", 24, torch.float32)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LillamaError, match="its tensors end at byte 312"):
        [TensorFile(path).read(key) for key in tensors]
    path.write_bytes(b"not a header at all, surely")
    with pytest.raises(LillamaError, match="no safetensors file"):
        TensorFile(path)
