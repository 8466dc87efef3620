"""Run directories: what is not ours stays, what is damaged is made again, what changed has a name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny

from lillama import LillamaError
from lillama.base import disk, manifest
from lillama.base.files import atomic_directory
from lillama.base.rundir import RunDirectory
from lillama.finetune import resume
from lillama.recipe.schema import Finetune
from lillama.run import pipeline
from lillama.testing import recipe_for, token_batches


@pytest.fixture
def run(tmp_path):
    """A model in a directory and what runs it: (recipe, batches)."""
    model = tiny()
    model.save_pretrained(tmp_path / "original")
    recipe = recipe_for(tmp_path / "original", tmp_path / "run", changes={"distill.epochs": 0, "compress.init": "svd"})
    return recipe, token_batches(model)


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text",
    [
        '{"manifest_version": 3, "name": "a browser\'s"}',
        "[]",
        "null",
        "not JSON",
        "",
        '{"version": 1, "fingerprint": {}, "files": []}',
        '{"version": 1, "fingerprint": {}, "files": {"../thesis.tex": "' + "0" * 64 + '"}}',
        '{"version": 1, "fingerprint": {}, "files": {"/etc/passwd": "' + "0" * 64 + '"}}',
        '{"version": 1, "fingerprint": {}, "files": {}, "also": ["../.."]}',
        '{"version": 1, "fingerprint": {}, "files": {}, "also": [7], "check": "x"}',
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_foreign_manifest_is_never_taken_for_a_runs(text, restart, tmp_path):
    home = tmp_path / "mine"
    (home / "model").mkdir(parents=True)
    for name in ("thesis.tex", "model/weights.bin", "events.jsonl"):
        (home / name).write_text("years of work")
    (home / manifest.NAME).write_text(text)
    before = names(home)
    with pytest.raises(LillamaError, match="not that of a run"):
        RunDirectory(home).open({}, restart)
    assert names(home) == before


def test_restart_removes_what_the_manifest_lists_and_says_what_it_left(run, tmp_path):
    recipe, batches = run
    pipeline.compress(recipe, batches=batches)
    out = tmp_path / "run"
    for name in ("notes.txt", "model/notes.txt", "layers/mine.safetensors"):
        (out / name).write_text("mine")
    (out / "papers").mkdir()
    (out / "papers" / "a.pdf").write_text("mine")
    other = recipe.model_copy(update={"compress": recipe.compress.model_copy(update={"reduction": 0.2})})
    with pytest.raises(LillamaError, match=r"recipe\.compress\.reduction: 0\.1 there, 0\.2 here") as caught:
        pipeline.compress(other, batches=batches)
    assert "--restart" in str(caught.value.hint)
    directory = RunDirectory(out)
    directory.open({"another": 1}, restart=True)
    assert directory.remarks and "layers/, model/, notes.txt, papers/" in directory.remarks[0]
    assert names(out) - {".lock", ".owner", manifest.NAME, manifest.COPY} == {
        "notes.txt",
        "model/notes.txt",
        "layers/mine.safetensors",
        "papers/a.pdf",
    }
    directory.close()
    shutil.rmtree(out / "papers")
    pipeline.compress(other, restart=True, batches=batches)
    # A checkpoint is a directory of its own: what lay there is beside it, not in it.
    assert (out / "model.unknown-1" / "notes.txt").read_text() == "mine"
    assert "notes.txt" not in names(out / "model")


def test_restart_does_not_reach_through_links(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open({})
    directory.put_json("layers/0.json", [])
    directory.put_json("model/config.json", [])
    directory.close()
    for name in ("layers", "streams"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.json").write_text("mine")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    again = RunDirectory(tmp_path / "run")
    again.open({"new": 1}, restart=True)
    assert (tmp_path / "layers" / "0.json").read_text() == (tmp_path / "streams" / "0.json").read_text() == "mine"
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("harm", ["flip", "empty", "delete", "cut"])
def test_the_copy_stands_in_for_a_damaged_manifest(harm, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open({"a": 1})
    directory.put_json("x.json", [1])
    directory.close()
    file = tmp_path / "run" / manifest.NAME
    text = file.read_text()
    damaged = {"flip": text.replace('"a": 1', '"a": 2'), "empty": "", "cut": text[: len(text) // 2]}
    assert text != damaged.get(harm)
    file.unlink()
    if harm != "delete":
        file.write_text(damaged[harm])
    again = RunDirectory(tmp_path / "run")
    again.open({"a": 1})
    assert again.json("x.json") == [1] and again.has("x.json")


def test_what_a_kill_leaves_is_removed_by_the_next_start(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open({})
    directory.put_json("layers/0.json", [])
    directory.close()
    for name in (".model.x7.part/model.safetensors", ".finetuned.y.part/a", "layers/.0.json.12.part"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    (tmp_path / "run" / "best.0001.safetensors").write_text("half")
    (tmp_path / "run" / ".mine").write_text("mine")
    RunDirectory(tmp_path / "run").open({})
    left = names(tmp_path / "run")
    assert left == {".lock", ".owner", manifest.NAME, manifest.COPY, "layers/0.json", ".mine"}


@pytest.mark.parametrize("moment", ["before the manifest", "before the name", "after"])
def test_a_kill_around_the_birth_of_a_checkpoint_is_survived(moment, run, tmp_path, monkeypatch):
    recipe, batches = run
    rename, write = Path.rename, RunDirectory._write

    def killed(self, target):
        if Path(target).name == "model":
            if moment == "after":
                rename(self, target)
            raise KeyboardInterrupt
        return rename(self, target)

    def killed_writing(self):
        if any(name.startswith("model/") for name in self._manifest.files):
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(*(RunDirectory, "_write", killed_writing) if "manifest" in moment else (Path, "rename", killed))
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process tidies nothing
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(recipe, batches=batches)
    monkeypatch.undo()
    result = pipeline.compress(recipe, batches=batches)
    assert (result.path / "model.safetensors").is_file()
    assert not list((tmp_path / "run").glob(".*.part")) and not list((tmp_path / "run").glob("*.unknown*"))


def test_a_model_is_known_by_its_content(run, tmp_path):
    recipe, batches = run
    original = tmp_path / "original"
    pipeline.compress(recipe, batches=batches)
    for path in original.iterdir():
        os.utime(path)
    pipeline.compress(recipe, batches=batches)  # touched is not changed
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    pipeline.compress(recipe, batches=batches)  # nor is another order of keys
    (tmp_path / "moved").symlink_to(original)
    elsewhere = recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": str(tmp_path / "moved")})})
    pipeline.compress(elsewhere, batches=batches)  # nor another place
    (original / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(LillamaError, match=r"model\.config\.json\.rms_norm_eps: 1e-06 there, 0\.5 here"):
        pipeline.compress(recipe, batches=batches)
    (original / "config.json").write_text(json.dumps(config))
    weights = original / "model.safetensors"
    about, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))  # of the same size and time
    with pytest.raises(LillamaError, match=r"model\.model\.safetensors: ") as caught:
        pipeline.compress(recipe, batches=batches)
    assert "--restart" in str(caught.value.hint)


@pytest.mark.parametrize("place", ["below a file", "read-only", "a file"])
def test_a_place_that_cannot_be_written_is_one_message(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    path = {"below a file": tmp_path / "file" / "run", "a file": tmp_path / "file"}.get(place, tmp_path / "run")
    if place == "read-only":

        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)  # whoever runs the tests may be allowed everything
    with pytest.raises(LillamaError, match=r"refuses|not an empty directory") as caught:
        RunDirectory(path).open({})
    assert caught.value.hint and str(tmp_path) in str(caught.value)


def checkpoint(work: Path, step: int, best: int, section: Finetune) -> Path:
    """What the trainer leaves at a step, sealed."""
    directory = work / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (directory / name).write_text(f"{name} {step}")
    state = {"global_step": step, "best_model_checkpoint": f"/moved/since/checkpoint-{best}"}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    resume.seal_checkpoint(work, step, section)
    return directory


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "model.safetensors", resume.SETTINGS])
@pytest.mark.parametrize("harm", ["cut", "empty", "delete"])
def test_a_damaged_checkpoint_of_the_trainer_gives_way_to_the_one_before(name, harm, tmp_path):
    section = Finetune.model_validate({})
    first, second = (checkpoint(tmp_path, step, 10, section) for step in (10, 20))
    assert resume.last_checkpoint(tmp_path, section) == second
    text = (second / name).read_text()
    (second / name).unlink()
    if harm != "delete":
        (second / name).write_text(text[:-1] if harm == "cut" else "")
    assert resume.last_checkpoint(tmp_path, section) == first
    assert not second.exists()


def test_a_checkpoint_whose_best_is_gone_or_of_other_settings_does_not_serve(tmp_path):
    section = Finetune.model_validate({})
    best, last = checkpoint(tmp_path, 10, 10, section), checkpoint(tmp_path, 20, 10, section)
    (best / "model.safetensors").write_text("flipped")
    assert resume.last_checkpoint(tmp_path, section) is None and not last.exists()
    checkpoint(tmp_path, 30, 30, section)
    assert resume.last_checkpoint(tmp_path, Finetune.model_validate({"seed": 1})) is None


def test_a_checkpoint_of_a_model_that_was_divided_is_continued_by_one_that_is(tmp_path):
    section = Finetune.model_validate({})
    checkpoint(tmp_path, 10, 10, section)
    resume.seal_checkpoint(tmp_path, 10, section, divided=True)
    assert resume.last_checkpoint(tmp_path, section, divided=True).name == "checkpoint-10"
    with pytest.raises(LillamaError, match="was divided") as caught:
        resume.last_checkpoint(tmp_path, section)
    assert caught.value.where == "run.divide" and "Set it to true" in caught.value.hint


@pytest.mark.slow
def test_a_run_directory_that_vanishes_is_one_message_and_the_same_command_begins_again(run, tmp_path, monkeypatch):
    recipe, batches = run
    whole = (pipeline.compress(recipe, batches=batches).path / "model.safetensors").read_bytes()
    for when in ("write", "measure"):
        shutil.rmtree(tmp_path / "run")
        with monkeypatch.context() as patch:
            function = getattr(pipeline.Run, when)

            def vanish(self, *arguments, function=function):
                shutil.rmtree(tmp_path / "run")
                return function(self, *arguments)

            patch.setattr(pipeline.Run, when, vanish)
            try:
                pipeline.compress(recipe, batches=batches)
            except LillamaError as error:
                assert error.hint and str(tmp_path) in str(error)
        assert (pipeline.compress(recipe, batches=batches).path / "model.safetensors").read_bytes() == whole


def test_a_line_of_events_that_was_cut_short_takes_no_other_with_it(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open({})
    directory.event("one")
    directory.close()
    with (tmp_path / "run" / "events.jsonl").open("a") as handle:
        handle.write('{"event": "cut')
    again = RunDirectory(tmp_path / "run")
    again.open({})
    again.event("two")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["event"] == "one" and json.loads(lines[-1])["event"] == "two"


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    dead, alive = tmp_path / f".out.{process.pid}.x1.part", tmp_path / f".out.{os.getpid()}.x2.part"
    for path in (dead, alive):
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
    assert not dead.exists() and alive.exists(), "of a process that works there now nothing is taken"


def test_a_run_without_room_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    recipe, batches = run
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(LillamaError, match=r"the run needs .* of disk, and .* are free"):
        pipeline.compress(recipe, batches=batches)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_lost_is_taken_from_the_checkpoint(run, tmp_path):
    recipe, batches = run
    recipe = recipe.model_copy(update={"compress": recipe.compress.model_copy(update={"strategy": "fisher"})})
    pipeline.compress(recipe, batches=batches)
    plan = tmp_path / "run" / "plan.json"
    chosen = plan.read_text()
    assert len({row["rank"] for row in json.loads(chosen)["weights"]}) > 2, "ranks were chosen by what was measured"
    plan.write_text(chosen.replace('"rank"', '"tank"'))
    assert pipeline.compress(recipe, batches=batches).plan.to_dict() == json.loads(chosen)
    assert plan.read_text() == chosen


@pytest.mark.parametrize("name", [".MANIFEST.json.77.part", ".lock"])
def test_a_run_that_was_killed_as_it_began_begins_again(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"version"')
    RunDirectory(tmp_path / "run").open({"a": 1})
    assert names(tmp_path / "run") == {".lock", ".owner", manifest.NAME, manifest.COPY}


def test_work_in_progress_goes_when_the_checkpoint_is_there(run, tmp_path, monkeypatch):
    recipe, batches = run
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "drop_work", lambda self: None)  # killed just before
        pipeline.compress(recipe, batches=batches)
    directory = RunDirectory(tmp_path / "run")
    directory.open(directory.held())
    directory.put_json("sensitivity/a.json", [])
    directory.put_json("snapshot.safetensors", [])
    directory.close()
    (tmp_path / "run" / "sensitivity" / "streams").mkdir()
    (tmp_path / "run" / "sensitivity" / "streams" / "0.bin").write_text("half")
    pipeline.compress(recipe, batches=batches)
    assert not (tmp_path / "run" / "sensitivity").exists()
    assert not (tmp_path / "run" / "snapshot.safetensors").exists()


@pytest.mark.parametrize("cause", [ConnectionRefusedError(111, "refused"), TimeoutError(110, "timed out")])
def test_a_network_that_fails_is_not_called_a_disk(cause, tmp_path):
    with pytest.raises(OSError, match=r"refused|timed out"), disk.explained(tmp_path):
        raise cause
    with pytest.raises(LillamaError, match="the disk refuses: No space left"), disk.explained(tmp_path):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))
