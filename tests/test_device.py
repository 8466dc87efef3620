"""Which device does the work: what is asked of it by name, what it lacks, and what does not fit on it.

Cards are stood in for by what torch.cuda would be asked; matrices on Apple's by tensors that refuse float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import tiny
from torch.overrides import TorchFunctionMode

from lillama.base import device, memory
from lillama.checkpoint.load import load
from lillama.contract import Weight
from lillama.errors import LillamaError
from lillama.evaluate import measure
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import token_losses
from lillama.evaluate.speed import weight_bytes
from lillama.evaluate.stable_rank import stable_rank
from lillama.factorise.known import WeightStatistics
from lillama.factorise.start import Initialiser
from lillama.pretrained.streams import budgets
from lillama.registry import INITIALISERS
from lillama.run import pipeline, prepare
from lillama.testing import recipe_for, token_batches

CPU, SECOND = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of a card of 1000 bytes, of which torch keeps 600 for later."""
    asked: list[Any] = []
    state = {"kept": 600}

    def empty_cache() -> None:
        asked.append("empty_cache")
        state["kept"] = 0

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: (1000 - state["kept"], 1000))
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda which=None, name=name: asked.append((name, which)))
    return asked


def test_a_device_and_a_type_are_chosen_by_name() -> None:
    assert device.choose("cpu", "float32") == device.Device(CPU, torch.float32)
    assert device.choose("cpu", "bfloat16").compute == torch.bfloat16
    with pytest.raises(LillamaError, match=r"run.device: the device 'quantum' cannot be used"):
        device.choose("quantum")


def test_the_device_of_a_recipe_becomes_the_current_one(
    card: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `cuda` alone, synchronisation and a library's own choice mean the first card."""
    device.Device(SECOND, torch.float32).activate()
    device.Device(CPU, torch.float32).activate()
    assert card == [("set_device", SECOND)]
    card.clear()
    tiny().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(device, "choose", lambda name, compute: device.Device(SECOND, torch.float32))
    prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run"))
    assert card == [("set_device", SECOND)]


def test_a_device_is_waited_for_by_name(card: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "synchronize", lambda: card.append("mps"))
    for one in (SECOND, CPU, torch.device("mps")):
        device.synchronise(one)
    assert card == [("synchronize", SECOND), "mps"]


def test_what_torch_keeps_for_later_is_free(card: list[Any]) -> None:
    """The driver counts cached blocks as taken: after an evaluation streams would go to the host though all is free."""
    assert budgets("auto", 0.0, SECOND) == (250, 0)
    assert budgets(1.0, 0.0, SECOND) == (2**30, 0)
    assert budgets("auto", 0.0, CPU) == (0, 0)


def test_giving_back_empties_the_card_s_cache_too(card: list[Any]) -> None:
    memory.give_back()
    assert card == ["empty_cache"]


# Apple's


class OnApple(torch.Tensor):
    """A tensor that says it is on MPS, where there is no float64."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, wanted = getattr(func, "__name__", ""), [*args[1:], *(kwargs or {}).values()]
        if name == "double" or (name == "to" and torch.float64 in wanted):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if name == "to" and CPU in wanted:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)


class Apple(TorchFunctionMode):
    """A machine that has such a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "to" and torch.device("mps") in args[1:]:
            if args[0].dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return args[0].as_subclass(OnApple)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("init", ["svd", "random", "whitened", "fisher", "mine"])
@pytest.mark.parametrize("kind", ["linear", "experts", "embedding"])
def test_factors_of_what_is_on_apple_s_device_are_made_on_the_host(init: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def on_apple(*shape: int) -> OnApple:
        return torch.randn(*shape, generator=generator).as_subclass(OnApple)

    def square(n: int) -> OnApple:
        x = on_apple(*(() if kind != "experts" else (2,)), n, 3 * n)
        return x @ x.mT

    weight = Weight("l.w", (12, 8), 2 if kind == "experts" else 1, kind)
    W = on_apple(*((2, 12, 8) if kind == "experts" else (12, 8)))
    statistics = {
        "whitened": {"gram": square(8)},
        "fisher": {"input_fisher": square(8), "output_fisher": square(8)},
    }.get(init, {})
    if kind == "embedding" and init == "whitened":
        statistics = {"counts": on_apple(12).abs()}
    if init == "mine":  # a plugin's own, which knows nothing of devices
        initialise = Initialiser(lambda W, rank: (W.double()[:, :rank], W.double()[:rank]), frozenset({"W", "rank"}), 0)
    else:
        initialise = Initialiser(INITIALISERS.get(init), INITIALISERS.needs(init), 0)
    with Apple():
        found = initialise(weight, W, 4, WeightStatistics(**statistics))
    assert all(factor.dtype == torch.float32 and factor.device.type == "mps" for factor in found)
    assert device.factorising(CPU) == CPU and device.factorising(SECOND) == SECOND


# Models larger than the card


def test_a_model_that_does_not_fit_is_spread_over_card_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-bias")
    size = weight_bytes(model)
    monkeypatch.setattr(device, "free_memory", lambda which: None if which.type == "cpu" else size * 3 // 4)
    spread: dict[str, Any] = {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, places: spread.update(places) or model)
    assert measure.put_on(model, SECOND) is model
    assert set(spread.values()) == {1, "cpu"}
    layers = {name for name in spread if name.startswith("model.layers")}
    assert layers == {f"model.layers.{i}" for i in range(3)}, "a layer is in one place"
    on_card = sum(weight_bytes(model.get_submodule(name)) for name, place in spread.items() if place == 1)
    assert 0 < on_card <= device.FILLED * size * 3 // 4


def test_a_model_that_does_not_fit_one_card_takes_others_unless_one_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-bias")
    size = weight_bytes(model)
    monkeypatch.setattr(device, "free_memory", lambda which: size * 3 // 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    spread: dict[str, Any] = {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, places: spread.update(places) or model)
    measure.put_on(model, torch.device("cuda"))
    assert set(spread.values()) == {0, 1}
    assert device.cards_like(SECOND) == [SECOND]


@pytest.mark.parametrize("storage", [None, "factors", "pivoted"])
def test_a_model_in_several_places_predicts_what_it_does_in_one(storage: str | None, tmp_path: Path) -> None:
    """By accelerate's hooks: half of it is in files, and comes for as long as a layer runs."""
    model = tiny("llama-bias")
    batches = token_batches(model)
    if storage is not None:
        model.save_pretrained(tmp_path / "model")
        changes = {"compress.storage": storage, "compress.init": "svd", "distill.epochs": 0}
        asked = recipe_for(tmp_path / "model", tmp_path / "run", changes=changes)
        model = load(pipeline.compress(asked, batches=batches).path).eval()
    expected = token_losses(model, batches[0]["input_ids"], 1)
    model = measure.spread(model, {"cpu": weight_bytes(model) // 2}, tmp_path / "offloaded")
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(token_losses(model, batches[0]["input_ids"], 1), expected)
    with pytest.raises(LillamaError, match=r"evaluate\.stable_rank: the model does not fit on the device"):
        stable_rank(model, Context(None, "cpu", 0))


def test_a_model_that_fits_goes_to_the_device_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    free = {"cuda": 2 * weight_bytes(model)}
    monkeypatch.setattr(device, "free_memory", lambda which: free.get(which.type))
    moved: list[torch.device] = []
    monkeypatch.setattr(model, "to", lambda where: moved.append(where) or model)
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *_: pytest.fail("it fits"))
    for where in (SECOND, CPU, torch.device("mps")):
        assert measure.put_on(model, where) is model
    assert moved == [SECOND, CPU, torch.device("mps")]
    assert device.fits(10**15, CPU)
