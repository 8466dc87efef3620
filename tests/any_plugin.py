"""A plugin for tests: every linear and every module of fused experts of the blocks, the embedding and the head."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from lillama import Layer, hookimpl
from lillama.host import Host


class Point:
    """An installed plugin's entry point, without the installation."""

    name = "any"
    dist = types.SimpleNamespace(name="any", version="1")

    def __init__(self, module: Any) -> None:
        self.load = lambda: module


def block(model: Any, name: str) -> Layer:
    """The block `name` with all that may be factorised, each for itself."""
    inside = [n for n, module in model.get_submodule(name).named_modules() if n]
    linears = Layer.of_linears(model, name, [(n,) for n in inside]).weights
    experts = [w for n in inside for w in Layer.of_experts(model, f"{name}.{n}")]
    return Layer(name, (*linears, *experts))


def layers_of(model: Any, ends: bool = False) -> list[Layer]:
    """The blocks of a model that lists them as `layers` or `h`; with the embedding and the head if `ends`."""
    lists = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.rpartition(".")[2] in "h layers"
    ]
    name, found = max(lists, key=lambda item: len(item[1]))
    blocks = [block(model, f"{name}.{i}") for i in range(len(found))]
    # What stands between blocks and head is a layer of the stream too.
    return [Layer.of_embedding(model), *blocks, Layer("model.norm"), Layer.of_head(model)] if ends else blocks


def serve(monkeypatch: Any, ends: bool = False) -> None:
    """Let this be the one plugin there is."""
    module = types.ModuleType("any_plugin")

    def enumerate_layers(model: Any) -> list[Layer]:
        return layers_of(model, ends)

    module.enumerate_layers = hookimpl(enumerate_layers)  # type: ignore[attr-defined]
    found = Host([Point(module)], only=[])
    monkeypatch.setattr("lillama.host.get", lambda: found)
