"""Whole runs on cards that are not there: nothing is left on the host, on another card, or asked of Apple in float64.

What stands in for a card is in pretended.py. The seeded mistakes at the end show that each kind is caught.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import test_mamba
import test_mixtral
import torch
from conftest import tiny, tokenizer
from pretended import Pretended
from pretended_machine import machine
from pretended_operations import Placed
from speech_models import folder, save
from torch import nn

from lillama.base import device as devices
from lillama.distill.student import Student
from lillama.factorise import initialisers
from lillama.pretrained import calls
from lillama.pretrained.streams import Stream
from lillama.recipe.schema import Recipe
from lillama.run import pipeline

CARD = "cuda:1"
TEXT = "the cat sat on a mat and ran . " * 60
MODELS = {"llama": tiny, "mixtral": test_mixtral.tiny, "mamba": lambda: test_mamba.tiny("mamba")}
FAST = {"strategy": "uniform", "init": "svd"}
TUNED = {"finetune": {"steps": 1, "batch_size": 2, "checks": 1}, "quantize": {"bits": 4, "what": "all"}}
TAUGHT = {**TUNED, "finetune": {**TUNED["finetune"], "sequence_length": 16, "teacher": 0.5}}
CONCURRENT = {"distill": {"schedule": "concurrent"}}
NARROW = {"compress": {"neurons": 0.5, "reduction": 0.4, "skip": ["*q_proj"]}, "evaluate": None}

# What the host itself computes with matrices while a card works, and why.
BY_HAND = (
    "lillama/dense/",  # small probes of how a module computes
    "lillama/lowrank/pivoted.py",  # which rows are pivots is scipy's to say; and a model is loaded on the host
    "lillama/lowrank/factors.py",
    "lillama/lowrank/arithmetic.py product_pivoted",  # transformers' Mamba scales what it loads, on the host
    "plugins/lillama_whisper/teacher.py hear",  # what is heard becomes features in transformers' extractor
    "lillama/evaluate/speech.py",
)
# On Apple's, which has no float64, factors are found on the host as well.
OF_APPLE = (
    *BY_HAND,
    "lillama/factorise/",
    "lillama/bits/",
    "lillama/lowrank/arithmetic.py",
    "lillama/lowrank/format.py",
)


def recipe(home: Path, name: str, device: str, changes: dict[str, Any]) -> Recipe:
    """A small recipe; `changes` are sections, or keys of them."""
    if name == "whisper":
        save(home / "model")
        data, text, evaluate = folder(home / "speech", 6), {}, {"wer": {"new_tokens": 2, "speed_tokens": 0}}
    else:
        for one in (MODELS[name](), tokenizer()):
            one.save_pretrained(home / "model")
        data, text = home / "text.txt", {"sequence_length": 16, "tokens": 128}
        data.write_text(TEXT)
        evaluate = {"perplexity": {"sequence_length": 16, "tokens": 32}}
    for options in evaluate.values():
        options["dataset"] = str(data)
    given: dict[str, Any] = {
        "model": {"id": str(home / "model"), "dtype": "float32"},
        "compress": {"reduction": 0.2, "of": "weights", "rank_multiple": 2},
        "distill": {"batch_size": 2, "checks": 1},
        "calibration": {"dataset": str(data), **text},
        "evaluate": evaluate,
        "run": {"out": str(home / "run"), "device": device},
    }
    for section, value in changes.items():
        given[section] = {**given.get(section, {}), **value} if isinstance(value, dict) else value
    return Recipe.parse(given)


def run(home: Path, name: str, device: str, changes: dict[str, Any] | None = None, fast: bool = False) -> Pretended:
    """A run from recipe to checkpoint."""
    asked = recipe(home, name, device, changes or {})
    with machine(device, fast) as pretended:
        result = pipeline.compress(asked)
    assert result.path.joinpath("model.safetensors").is_file()
    metrics = json.loads((home / "run" / "metrics.json").read_text())
    assert len(metrics["before"]) == len(metrics["after"])
    return pretended


def check(pretended: Pretended, allowed: tuple[str, ...] = BY_HAND) -> None:
    """Assert that all was done on the card that was asked for."""
    assert set(pretended.devices) == {str(pretended.asked)}, pretended.strays
    places = (re.sub(r":\d+ ", " ", place, count=1) for place in pretended.by_hand)  # lines move
    assert not [place for place in places if not place.startswith(allowed)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "to few bits": ("llama", TAUGHT),
    "experts": ("mixtral", {"quantize": {"bits": 4, "method": "nearest"}}),
    "a scan, all at once": ("mamba", CONCURRENT),
    "speech, all at once": ("whisper", CONCURRENT),
    "tight": ("llama", {"distill": {"schedule": "concurrent"}, "run": {"low_memory": True}, "evaluate": None}),
    "embedding and head": ("llama", {"plugin": "inkuba", "compress": FAST, "evaluate": None}),
    "fewer neurons": ("llama", NARROW),
    "refitted": ("llama", {"compress": {**FAST, "init": "compensated"}, "evaluate": None}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_a_run_is_on_the_card_that_was_asked_for(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    check(run(tmp_path, name, CARD, changes))


def test_a_run_in_bfloat16_is_on_the_card_that_was_asked_for(tmp_path: Path) -> None:
    check(run(tmp_path, "llama", CARD, {"compress": FAST}, fast=True))


@pytest.mark.parametrize(("name", "changes"), [("llama", TAUGHT), ("mixtral", CONCURRENT), ("llama", NARROW)])
@pytest.mark.slow
def test_a_run_asks_apple_for_nothing_in_float64(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check(run(tmp_path, name, "mps", changes), OF_APPLE)


# Waiting


def waits(home: Path, epochs: int, changes: dict[str, Any]) -> Counter[str]:
    """How often the host waited, by function, in a run of so many epochs."""
    home.mkdir()
    quiet = {"compress": FAST, "evaluate": None, **changes}
    quiet["distill"] = {"epochs": epochs, "holdout": 0.0, **changes.get("distill", {})}
    found: Counter[str] = Counter()
    for place, times in run(home, "llama", CARD, quiet).waits.items():
        found[re.sub(r":\d+ ", " ", place)] += times
    return found


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.slow
def test_no_step_waits_for_the_card_but_to_report(schedule: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Losses are read every 16 steps; of more steps that is all that grows, but for what the model's class looks at."""
    steps: list[int] = []
    step = Student.step
    monkeypatch.setattr(Student, "step", lambda self, *given: (steps.append(1), step(self, *given))[1])
    changes = {"distill": {"schedule": schedule}, "run": {"stream_device_memory": 0.0}}
    few = waits(tmp_path / "few", 4, changes)
    taken = len(steps)
    many = waits(tmp_path / "many", 12, changes)
    more, grown = len(steps) - 2 * taken, many - few
    reports = more // 16 + 3  # every layer has its own
    assert more >= 96
    assert grown.pop("lillama/distill/losslog.py read: tolist", 0) <= reports
    if schedule == "concurrent":  # transformers looks at masks whenever a batch begins, once for all layers
        assert grown.pop("lillama/pretrained/calls.py run_model: _local_scalar_dense", 0) <= more // 3
        assert grown.pop("lillama/pretrained/walk.py read: tolist", 0) <= reports
    assert not grown


def test_statistics_are_summed_without_waiting_for_the_card(tmp_path: Path) -> None:
    found = run(tmp_path, "llama", CARD, {"distill": {"epochs": 0}, "evaluate": None}).waits
    assert not [place for place in found if re.search(r"kfac.py:\d+ (add|_inputs)", place)]
    assert not [place for place in found if "predictions.py" in place]


def test_streams_are_brought_to_the_card_while_it_works() -> None:
    with machine(CARD) as pretended:
        stream = Stream("host", torch.device(CARD), Path("unused"))
        made = [torch.full((2, 2), float(i), device=CARD) for i in range(3)]
        for one in made:
            stream.append(one)
        assert len(pretended.pinned) == 3 and not pretended.waits
        first = stream[0]
        assert stream[0] is first, "two streams that are the same give the same tensor"
        assert pretended.order == ["copies waits for work", "on copies"]
        pretended.order.clear()
        assert torch.equal(stream[1].cpu(), made[1].cpu())
        assert pretended.order == [
            "work waits for copies",
            "kept for copies",
            "copies waits for work",
            "on copies",
        ] or (pretended.order == ["work waits for copies", "kept for work", "copies waits for work", "on copies"])
        pretended.waits.clear()
        assert float(stream[0].held[0, 0]) == 0.0, "any other can be had as well"
        assert not pretended.waits
        stream.drop()


# Seeded mistakes


def test_a_tensor_left_on_the_host_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "send", lambda tensor, _: tensor)
    with pytest.raises(RuntimeError, match=r"same device, but found cpu and cuda:1.*at lillama/pretrained/calls\.py"):
        run(tmp_path, "llama", CARD, {"compress": FAST, "evaluate": None})


def test_work_left_on_the_host_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused where all of an operation is on the host; it is slow."""
    svd = initialisers.svd

    def slow(W: torch.Tensor, rank: int) -> Any:
        return svd(W.cpu(), rank)

    monkeypatch.setattr(initialisers, "svd", slow)
    monkeypatch.setattr("lillama.registry.INITIALISERS.get", lambda name: slow)
    found = run(tmp_path, "llama", CARD, {"compress": FAST, "evaluate": None})
    with pytest.raises(AssertionError, match=r"initialisers\.py"):
        check(found)


def test_another_card_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` without a number is the first card unless the run makes its own the current one."""
    monkeypatch.setattr(devices.Device, "activate", lambda self: None)
    monkeypatch.setattr(calls, "send", lambda tensor, _: tensor.to("cuda"))
    with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cuda:1"):
        run(tmp_path, "llama", CARD, {"compress": FAST, "evaluate": None})
    with machine(CARD) as pretended:
        torch.zeros(3, device="cuda:0")
    with pytest.raises(AssertionError, match=r"test_another_card_is_found: cuda:0"):
        check(pretended)


def test_float64_on_apple_s_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", ())
    with pytest.raises(TypeError, match=r"MPS Tensor to float64 dtype \(lillama/factorise/initialisers\.py"):
        run(tmp_path, "llama", "mps", {"compress": FAST, "evaluate": None})


def test_what_stands_in_for_a_card_has_real_numbers_and_gradients() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    with machine(CARD) as pretended:
        there = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)).to(CARD)
        there.load_state_dict(plain.state_dict())
        loss = there(x.to(CARD)).square().mean()
        loss.backward()
        gradients = [parameter.grad for parameter in there.parameters()]
        assert all(isinstance(one, Placed) and str(one.device) == CARD for one in gradients)
        value, found = loss.item(), [one.cpu() for one in gradients]
        with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
            loss.detach().numpy()
    expected = plain(x).square().mean()
    expected.backward()
    assert value == expected.item()
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(found, plain.parameters()))
    assert sum(pretended.waits.values()) > 0
