"""GGUF files are gone through once, and again where they are others."""

from __future__ import annotations

import os

import pytest

from lillama.pretrained.gguf import forget, read_once

gguf = pytest.importorskip("gguf")


@pytest.fixture
def counted(monkeypatch):
    """What the package is asked: files read, architectures listed."""
    asked = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path, mode="r": asked.append(path) or object())
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda arch, blocks: asked.append((arch, blocks)) or object())
    yield asked
    forget()


def test_a_file_is_read_once_until_it_changes(counted, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    found = []
    for _ in range(2):
        with read_once():
            found += [gguf.GGUFReader(str(file)), gguf.get_tensor_name_map(1, 30), gguf.get_tensor_name_map(1, 30)]
    assert counted == [str(file), (1, 30)] and len(set(map(id, found))) == 2
    file.write_bytes(b"another")
    os.utime(file, ns=(1, 1))
    with read_once():
        assert gguf.GGUFReader(file) is not found[0]
    assert counted == [str(file), (1, 30), str(file)]


def test_the_package_is_as_it_was_behind_the_block(counted):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(OSError, match="no-such-file"), read_once():
        assert gguf.GGUFReader is not before[0]
        gguf.GGUFReader("no-such-file")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before and counted == []
