"""A run directory is one process' own, and a checkpoint in it is whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import tiny

from lillama import LillamaError
from lillama.base.rundir import RunDirectory
from lillama.run import pipeline
from lillama.testing import recipe_for, token_batches

HOLD = """
import sys, time
from pathlib import Path
from lillama.base.rundir import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.open({"recipe": 1})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that has opened the run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_process_is_refused_and_told_who_is_there(other, tmp_path, restart):
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(LillamaError, match=f"another process works.*process {other.pid} on ") as caught:
        RunDirectory(tmp_path / "run").open({"recipe": 1}, restart)
    assert caught.value.hint
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before, "the refused one changed something"
    other.kill()
    other.wait()
    directory = RunDirectory(tmp_path / "run")
    directory.open({"recipe": 1}, restart)  # a process that was killed keeps nobody out
    assert str(os.getpid()) in (tmp_path / "run" / ".owner").read_text()


def test_a_directory_can_be_opened_again_once_it_is_closed(tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open({"recipe": 1})
    with pytest.raises(LillamaError, match="another process"):
        second.open({"recipe": 1})
    first.put_json("a.json", [1])
    first.close()
    second.open({"recipe": 1})
    assert second.json("a.json") == [1]
    second.close()
    second.open({"recipe": 2}, restart=True)
    assert not second.has("a.json") and not (tmp_path / "run" / "a.json").exists()


def test_one_damaged_file_of_a_checkpoint_makes_all_of_it_unfinished(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open({})
    names = ["model/config.json", "model/index.json", "finetuned/config.json", "layers/0.json"]
    for name in names:
        directory.put_json(name, name)
    directory.close()
    (tmp_path / "run" / "model" / "index.json").write_text("{}")
    again = RunDirectory(tmp_path / "run")
    again.open({})
    assert [again.has(name) for name in names] == [False, False, True, True]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_damaged_weights_are_written_again_by_the_same_command(harm, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "original")
    recipe = recipe_for(tmp_path / "original", tmp_path / "run")
    weights = pipeline.compress(recipe, batches=token_batches(model)).path / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "delete":
        weights.unlink()
    else:
        broken = bytearray(whole if harm == "flip" else whole[:-100])
        broken[-20] ^= 1
        weights.write_bytes(broken)
    pipeline.compress(recipe, batches=token_batches(model))
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_kill_while_files_are_dropped_leaves_none_that_nobody_knows(removed, tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "run")
    directory.open({"of": 1})
    for name in ("sensitivity/a.json", "sensitivity/b.json", "kept.json"):
        directory.put_json(name, {})
    remove, done = RunDirectory._remove, []

    def killed(self, name, whole=False):
        if len(done) == removed:
            raise KeyboardInterrupt
        done.append(name)
        remove(self, name, whole)

    monkeypatch.setattr(RunDirectory, "_remove", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.drop_work()
    directory.close()
    monkeypatch.undo()

    again = RunDirectory(tmp_path / "run")
    again.open({"of": 1})
    again.drop_work()
    again.close()
    assert not (tmp_path / "run" / "sensitivity").exists()
    assert again.has("kept.json") and not again.remarks
