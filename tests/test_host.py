"""The plugin host: guards, selection, and a plugin that is installed as a stranger's would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lillama import Layer, hookimpl, host, registry
from lillama.errors import LillamaError
from lillama.host import Host
from lillama.recipe.schema import Recipe

MODEL = SimpleNamespace(config=SimpleNamespace(model_type="novel"))
LAYERS = [Layer("layers.0")]
DATA: dict[str, Any] = {
    "model": {"id": "x"},
    "compress": {"reduction": 0.5},
    "calibration": {"dataset": "d"},
    "run": {"out": "o"},
}


@dataclass
class Point:
    """What the host uses of an entry point."""

    name: str
    load: Callable[[], Any]
    dist: Any = field(default_factory=lambda: SimpleNamespace(name="stranger", version="1.2"))


def point(name: str, distribution: str | None = None, **functions: Any) -> Point:
    module = ModuleType(name)
    for hook, function in functions.items():
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    return Point(name, lambda: module, SimpleNamespace(name=distribution or f"dist-{name}", version="1.2"))


def recipe(plugin: str = "auto") -> Recipe:
    # Not Recipe.parse: it would ask this process's own host for the plugin.
    return Recipe.model_validate({**DATA, "plugin": plugin})


def layers(found: Host, plugin: str = "auto") -> tuple[str, list[Layer]]:
    chosen, its_layers = found.layers(MODEL, recipe(plugin))  # type: ignore[arg-type]
    return chosen.name, its_layers


def failing(error: BaseException) -> Callable[..., Any]:
    def hook() -> Any:
        raise error

    return hook


KNOWS = point("knows", enumerate_layers=lambda model: LAYERS if model.config.model_type == "novel" else None)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LILLAMA_PLUGINS", raising=False)
    for known in (registry.STRATEGIES, registry.EVALUATORS):
        monkeypatch.setattr(known, "_targets", dict(known._targets))
    yield
    registry.discover_again()


def installed(monkeypatch: pytest.MonkeyPatch, *points: Point) -> Host:
    """A host of these plugins, as that of this process; the registries are filled by the next look-up."""
    found = Host(list(points))
    monkeypatch.setattr(host, "get", lambda: found)
    registry.discover_again()
    return found


# Loading


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'rocm'"), RuntimeError("driver"), SystemExit(3), SyntaxError("bad")]
)
def test_a_plugin_that_cannot_be_imported_is_named_and_others_serve(error: BaseException) -> None:
    found = Host([Point("broken", failing(error)), KNOWS])
    broken = found.plugins["broken"]
    assert str(broken) == "broken (stranger 1.2)"
    assert broken.failure == f"cannot be imported: {type(error).__name__}: {error}"
    assert "Traceback" in broken.details
    assert broken.hooks == []
    assert layers(found) == ("knows", LAYERS)
    with pytest.raises(LillamaError, match=r"the plugin broken \(stranger 1.2\) cannot be imported"):
        layers(found, "broken")


def test_a_misspelt_hook_is_refused() -> None:
    found = Host([point("a_typo", enumerate_layer=lambda model: LAYERS), KNOWS])
    failure = str(found.plugins["a_typo"].failure)
    assert "'enumerate_layer'" in failure
    assert "Did you mean 'enumerate_layers'?" in failure
    assert layers(found) == ("knows", LAYERS)
    with pytest.raises(LillamaError, match=r"the plugin a_typo \(dist-a_typo 1.2\) implements a hook that does not"):
        layers(found, "a_typo")


def test_a_misspelt_hook_of_an_object_and_a_hook_by_another_name() -> None:
    class Typo:
        @hookimpl
        def evaluat(self, model: Any) -> None: ...

    class Renamed:
        @hookimpl(specname="enumerate_layers")
        def mine(self, model: Any) -> list[Layer]:
            return LAYERS

    found = Host([Point("typo", Typo), Point("renamed", Renamed)])
    assert "Did you mean 'evaluate'?" in str(found.plugins["typo"].failure)
    assert found.plugins["renamed"].hooks == ["enumerate_layers"]
    assert layers(found) == ("renamed", LAYERS)


def test_a_misspelt_argument_is_refused() -> None:
    found = Host([point("a_typo", enumerate_layers=lambda modle: LAYERS), KNOWS])
    assert "modle" in str(found.plugins["a_typo"].failure)
    assert layers(found) == ("knows", LAYERS)


def test_a_plugin_without_hooks_is_told_what_it_lacks() -> None:
    module = ModuleType("silent")
    module.enumerate_layers = lambda model: LAYERS  # type: ignore[attr-defined]
    found = Host([Point("silent", lambda: module), Point("nothing", lambda: None)])
    assert "lillama.hookimpl" in str(found.plugins["silent"].failure)
    assert "lillama.hookimpl" in str(found.plugins["nothing"].failure)


def test_two_plugins_of_one_name() -> None:
    first, second = KNOWS, point("knows", "copycat", enumerate_layers=lambda: LAYERS)
    found = Host([first, second])
    assert layers(found) == ("knows", LAYERS)
    assert str(found.plugins["knows"]) == "knows (dist-knows 1.2)"
    assert "has the name of knows (dist-knows 1.2)" in str(found.plugins["knows (copycat 1.2)"].failure)


def test_hooks_of_a_plugin() -> None:
    found = Host([point("both", evaluate=lambda: {}, enumerate_layers=lambda: LAYERS)])
    assert sorted(found.plugins["both"].hooks) == ["enumerate_layers", "evaluate"]


# Selection


def test_the_environment_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [point("a_first", enumerate_layers=lambda: LAYERS), Point("broken", failing(ImportError()))]
    assert layers(Host([KNOWS, *others]))[0] == "a_first"
    monkeypatch.setenv("LILLAMA_PLUGINS", " knows, ")
    found = Host([KNOWS, *others])
    assert list(found.plugins) == ["knows"]
    assert layers(found)[0] == "knows"
    monkeypatch.setenv("LILLAMA_PLUGINS", "knows,a_frist")
    with pytest.raises(LillamaError) as caught:
        Host([KNOWS, *others])
    assert str(caught.value) == "LILLAMA_PLUGINS: no plugin is called 'a_frist'\n  Did you mean 'a_first'?"


def test_an_iterator_of_entry_points_serves() -> None:
    with pytest.raises(LillamaError, match="Did you mean 'knows'"):
        Host(iter([KNOWS]), only=["know"])


def test_the_recipe_narrows() -> None:
    found = Host([KNOWS, point("a_first", enumerate_layers=lambda: LAYERS)])
    assert layers(found, "knows")[0] == "knows"
    with pytest.raises(LillamaError) as caught:
        layers(found, "kowns")
    assert str(caught.value) == "plugin: no plugin is called 'kowns'\n  Did you mean 'knows'?"


def test_a_recipe_that_names_a_failed_plugin_is_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Point("broken", failing(ImportError("x"))))
    assert Recipe.parse(DATA).plugin == "auto"
    with pytest.raises(LillamaError, match=r"--set plugin=broken: the plugin broken \(stranger 1.2\) cannot"):
        Recipe.parse(DATA, ["plugin=broken"])


def test_no_plugin_knows_the_model() -> None:
    found = Host(
        [
            Point("broken", failing(ImportError("x"))),
            point("other", enumerate_layers=lambda: None),
            point("empty", enumerate_layers=lambda: []),
            point("raises", enumerate_layers=failing(KeyError("wq"))),
        ]
    )
    with pytest.raises(LillamaError) as caught:
        layers(found)
    message = str(caught.value)
    assert "no plugin knows SimpleNamespace (model_type 'novel'); asked: empty, other, raises" in message
    assert "enumerate_layers" in message
    assert "docs/plugins.md" in message
    assert "broken (stranger 1.2) cannot be imported: ImportError: x" in message
    assert "raises (dist-raises 1.2) failed in enumerate_layers: KeyError: 'wq'" in message
    with pytest.raises(LillamaError, match="asked: none"):
        layers(Host([]))


# Hooks


def test_a_plugin_that_raises_is_passed_over_and_named(caplog: pytest.LogCaptureFixture) -> None:
    found = Host([point("a_raises", enumerate_layers=failing(KeyError("wq"))), KNOWS])
    assert layers(found) == ("knows", LAYERS)
    assert "a_raises (dist-a_raises 1.2) failed in enumerate_layers: KeyError: 'wq'" in caplog.text
    with pytest.raises(LillamaError, match=r"a_raises \(dist-a_raises 1.2\) failed in enumerate_layers") as caught:
        layers(found, "a_raises")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_plugins_own_error_is_named() -> None:
    found = Host([point("strict", enumerate_layers=failing(LillamaError("needs float32", hint="Set model.dtype.")))])
    with pytest.raises(LillamaError) as caught:
        layers(found, "strict")
    assert str(caught.value) == "plugin strict (dist-strict 1.2): needs float32\n  Set model.dtype."
    with pytest.raises(LillamaError, match=r"plugin strict \(dist-strict 1.2\): needs float32"):
        layers(found)


@pytest.mark.parametrize("returned", [["layers.0"], 3, [LAYERS]])
def test_what_is_no_list_of_layers_is_refused(returned: Any) -> None:
    found = Host([point("odd", enumerate_layers=lambda: returned)])
    with pytest.raises(LillamaError, match=r"odd \(dist-odd 1.2\) failed in enumerate_layers: TypeError"):
        layers(found, "odd")


def test_a_plugin_is_told_whether_it_was_asked_for_and_that_there_is_no_recipe() -> None:
    told: list[Any] = []

    def enumerate_layers(model: Any, recipe: Any, asked: bool) -> list[Layer]:
        told.append((recipe and recipe.plugin, asked))
        return LAYERS

    found = Host([point("mine", enumerate_layers=enumerate_layers)])
    for arguments in ((recipe(),), (recipe("mine"),), (None,), (None, "mine")):
        assert found.layers(MODEL, *arguments)[0].name == "mine"  # type: ignore[arg-type]
    assert told == [("auto", False), ("mine", True), (None, False), (None, True)]
    assert found.auto_class(MODEL.config, None, "mine") is None


def test_the_auto_class_of_a_plugin() -> None:
    whisper = SimpleNamespace(model_type="whisper")
    asks = point("speech", auto_class=lambda config, recipe: "Speech" if config.model_type == "whisper" else None)
    raises = point("a_raises", auto_class=failing(ValueError("x")))
    found = Host([raises, KNOWS, asks])
    assert found.auto_class(whisper, recipe()) == "Speech"
    assert found.auto_class(SimpleNamespace(model_type="novel"), recipe()) is None
    assert found.auto_class(whisper, recipe("knows")) is None
    with pytest.raises(LillamaError, match="failed in auto_class: ValueError: x"):
        found.auto_class(whisper, recipe("a_raises"))


def test_calibration_and_metrics_are_of_the_chosen_plugin_alone() -> None:
    mine = point("mine", calibration_stream=lambda: [{"x": 1}], evaluate=lambda: {"task/metric": 1})
    found = Host(
        [mine, KNOWS, point("raises", evaluate=failing(ValueError()), calibration_stream=failing(ValueError()))]
    )
    for_mine = found.plugins["mine"], MODEL, recipe()
    stream = found.calibration_stream(*for_mine)  # type: ignore[arg-type]
    assert stream is not None
    assert list(stream) == list(stream) == [{"x": 1}]
    assert found.evaluate(*for_mine) == {"task/metric": 1.0}  # type: ignore[arg-type]
    for_other = found.plugins["knows"], MODEL, recipe()
    assert found.calibration_stream(*for_other) is None  # type: ignore[arg-type]
    assert found.evaluate(*for_other) == {}  # type: ignore[arg-type]


def test_a_stream_that_breaks_half_way_is_named() -> None:
    def batches() -> Iterator[dict[str, int]]:
        yield {"x": 1}
        raise OSError("disk")

    found = Host([point("mine", calibration_stream=lambda: batches())])
    stream = found.calibration_stream(found.plugins["mine"], MODEL, recipe())  # type: ignore[arg-type]
    with pytest.raises(LillamaError, match=r"mine \(dist-mine 1.2\) failed in calibration_stream: OSError: disk"):
        list(stream or ())


@pytest.mark.parametrize("returned", [[1], {"task/metric": "high"}, 3])
def test_metrics_that_are_none_are_named(returned: Any) -> None:
    found = Host([point("odd", evaluate=lambda: returned)])
    with pytest.raises(LillamaError, match=r"odd \(dist-odd 1.2\) failed in evaluate"):
        found.evaluate(found.plugins["odd"], MODEL, recipe())  # type: ignore[arg-type]


# Registering


def test_a_plugins_strategy_serves_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(layers: Any, remove: Any, compress: Any) -> None: ...

    def register(registries: Any) -> None:
        registries.strategies.add("halves", halves)

    with monkeypatch.context() as patch:
        installed(patch)
        with pytest.raises(LillamaError, match="no strategy is called 'halves'"):
            Recipe.parse(DATA, ["compress.strategy=halves"])
    installed(monkeypatch, point("mine", register=register))
    for _ in range(2):
        assert Recipe.parse(DATA, ["compress.strategy=halves"]).compress.strategy == "halves"
    assert registry.STRATEGIES.get("halves") is halves
    Host([point("mine", register=register)]).register()  # a second host of the process


def test_a_plugin_that_fails_to_register_is_named_and_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(registries: Any) -> None:
        registries.strategies.add("uniform", "json:dumps")

    raises = point("a_raises", register=failing(KeyError("x")), enumerate_layers=lambda: LAYERS)
    found = installed(monkeypatch, raises, point("b_takes", register=takes), KNOWS)
    assert Recipe.parse(DATA, ["compress.strategy=uniform"]).compress.strategy == "uniform"
    assert "a_raises (dist-a_raises 1.2) failed in register: KeyError: 'x'" in str(found.plugins["a_raises"].failure)
    assert "'uniform' is already registered" in str(found.plugins["b_takes"].failure)
    assert layers(found) == ("knows", LAYERS)
    with pytest.raises(LillamaError, match="failed in register"):
        layers(found, "a_raises")


# The real thing
