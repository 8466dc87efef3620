"""The disk a run needs: as much as it was told before, and refused where there is less."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import disk_runs
import pytest
from rich.console import Console

from lillama.cli import show
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe
from lillama.run import disk, prepare
from lillama.run.estimate import check_disk, estimate


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    place = tmp_path_factory.mktemp("home")
    disk_runs.build(place)
    return place


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes are free; what was asked about is kept."""
    asked = []

    def free(count):
        def usage(path):
            asked.append(path)
            return SimpleNamespace(free=int(count))

        monkeypatch.setattr(shutil, "disk_usage", usage)
        return asked

    return free


@pytest.mark.slow
def test_a_run_holds_as_much_as_was_estimated(home):
    """Others are measured by `python tests/faults/disk_runs.py`."""
    estimated, most = disk_runs.peak(disk_runs.recipe(home, disk_runs.RUNS["one by one, streams in files"]))
    assert most <= estimated  # with what stands beside the weights
    assert 0.9 * most < estimated - disk.BESIDE < 1.25 * most


def test_a_run_without_room_is_refused_and_little_room_told(home, room):
    prepared = prepare.prepare(disk_runs.recipe(home, ()))
    wanted = estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device).disk
    asked = room(0.99 * wanted)
    with pytest.raises(LillamaError, match=r"the run needs .* of disk, and .* are free") as caught:
        check_disk(prepared)
    assert caught.value.where == "run.out"
    assert str(asked[-1]) == prepared.recipe.run.out.removesuffix("/run")  # what exists of it
    room(1.1 * wanted)
    assert "little room: the run needs" in str(check_disk(prepared))
    room(1.21 * wanted)
    assert check_disk(prepared) is None


def test_what_the_run_left_there_counts_as_free(home, room):
    prepared = prepare.prepare(disk_runs.recipe(home, ()))
    wanted = estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device).disk
    out = home / "held" / "run"
    (out / "layers").mkdir(parents=True)
    (out / "layers" / "x").write_bytes(b"\0" * (wanted // 2))
    held = prepare.prepare(Recipe.parse(prepared.recipe.model_dump(mode="json"), [f"run.out={out}"]))
    room(0.8 * wanted)
    with pytest.raises(LillamaError):
        check_disk(prepared)
    assert check_disk(held) is None


def test_a_plan_is_shown_with_the_room_there_is(home, room):
    prepared = prepare.prepare(disk_runs.recipe(home, ()))
    shown = {}
    for free in (1000, 10**12):
        room(free)
        console = Console(width=200)
        with console.capture() as said:
            console.print(show.plan(prepared))
        shown[free] = said.get()
    assert "not enough room: the run needs" in shown[1000]
    assert "1000 B are free" in shown[1000]
    assert "room" not in shown[10**12]
