"""What runs share of what they measured: taken over whole or not at all, and only by a run that measures the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lillama.base.rundir import RunDirectory
from lillama.run.common import Common

FILES = ["sensitivity/model.layers.0.safetensors", "sensitivity/model.layers.1.safetensors"]


def identity(seed: int = 0, quantize: dict[str, Any] | None = None, **compress: Any) -> dict[str, Any]:
    recipe = {"compress": {"fisher_tokens": 64, **compress}, "distill": {"batch_size": 2}, "run": {"seed": seed}}
    if "size" in compress:  # without, the fingerprint has no such section
        recipe["quantize"] = quantize
    return {"recipe": recipe, "data": "1234"}


def opened(place: Path, about: dict[str, Any]) -> RunDirectory:
    directory = RunDirectory(place)
    directory.open(about)
    return directory


def measured(tmp_path: Path, common: Common) -> dict[str, torch.Tensor]:
    """A run that measured leaves its files; then it is over, and drops them."""
    directory = opened(tmp_path / "first", identity(reduction=0.2))
    tensors = {"input": torch.randn(8, 8)}
    for file in FILES:
        directory.put_tensors(file, tensors)
    common.leave(directory, identity(reduction=0.2), FILES)
    directory.drop_work()
    assert not (directory.path / FILES[0]).exists()
    directory.close()
    return tensors


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_another_size_takes_over_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*given: Any) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    common = Common(tmp_path)
    tensors = measured(tmp_path, common)
    about = identity(reduction=0.4)
    second = opened(tmp_path / "second", about)
    assert common.take(second, about, FILES)
    assert all(torch.equal(second.tensors(file)["input"], tensors["input"]) for file in FILES)
    assert not common.take(second, about, FILES)  # they are there
    second.drop_work()
    second.close()
    # Whoever has dropped its own takes nothing from the others.
    third = opened(tmp_path / "third", about)
    assert common.take(third, about, FILES)
    common.drop()
    assert torch.equal(third.tensors(FILES[0])["input"], tensors["input"])
    third.close()


@pytest.mark.parametrize("other", [identity(seed=1), identity(fisher_tokens=128), identity() | {"data": "5678"}])
def test_a_run_that_measures_otherwise_takes_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    common = Common(tmp_path)
    measured(tmp_path, common)
    second = opened(tmp_path / "second", other)
    assert not common.take(second, other, FILES)
    assert not any(second.has(file) for file in FILES)
    second.close()


def test_numbers_of_bytes_share_what_is_measured_for_groups_of_one_size() -> None:
    def key(size: float, **quantize: Any) -> str:
        return Common(Path())._measured(identity(size=size, quantize=quantize or None)).name

    alike = {key(0.25, group_size=32, bits=4), key(0.2, group_size=32, bits=4), key(0.2, group_size=32, bits="auto")}
    assert len(alike) == 1
    assert key(0.25, group_size=64, bits=4) not in alike
    # Without few bits nothing of them is measured: as where a share of the parameters is given.
    assert {key(0.5), key(0.6)} == {Common(Path())._measured(identity(reduction=0.2)).name} and key(0.5) not in alike


def test_two_runs_that_measured_the_same_at_once_both_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one leaves its files while this one is about to."""
    common, about = Common(tmp_path), identity(reduction=0.4)
    directory = opened(tmp_path / "second", about)
    for file in FILES:
        directory.put_tensors(file, {"input": torch.zeros(8, 8)})
    link = os.link
    others: list[dict[str, torch.Tensor]] = []
    begun: list[Any] = []

    def meanwhile(*given: Any) -> None:
        if not begun:
            begun.append(given)
            others.append(measured(tmp_path, common))
        link(*given)

    monkeypatch.setattr(os, "link", meanwhile)
    common.leave(directory, about, FILES)
    assert [path.name for path in (tmp_path / "sensitivity").iterdir()] == [common._measured(about).name]
    third = opened(tmp_path / "third", about)
    assert common.take(third, about, FILES)
    assert torch.equal(third.tensors(FILES[0])["input"], others[0]["input"])
    directory.close()
    third.close()


def test_files_that_are_not_all_there_are_not_taken(tmp_path: Path) -> None:
    common = Common(tmp_path)
    measured(tmp_path, common)
    about = identity(reduction=0.4)
    second = opened(tmp_path / "second", about)
    assert not common.take(second, about, [*FILES, "sensitivity/model.layers.2.safetensors"])
    assert not any(second.has(file) for file in FILES)
    second.close()
