"""Whether layers that are driven one by one compute what the model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.pretrained.calls import arguments
from lillama.pretrained.walk import Walk
from lillama.run.prepare import Prepared


class StreamsDifferError(AssertionError):
    """A layer driven by itself put out something else than it does inside the model."""


def check_streams(prepared: Prepared, model: Any, batch: Mapping[str, Tensor]) -> None:
    """Assert that driving the layers of `prepared` one by one gives what `model` gives at every layer, bit for bit.

    `model` is the whole original, loaded, in the type of `prepared.source.working`; the source was fetched, and the
    plugin's `prepare` was called on both. `batch` holds the model's forward arguments. Raises StreamsDifferError, which
    names the first layer that differs.
    """
    source, layers = prepared.source, prepared.layers
    walk = Walk(source, layers, layers, prepared.device, Progress())
    wanted = _outputs(model, layers, batch)
    with walk.capture() as capture:
        captured, hidden = capture(batch)
    for position, layer in enumerate(layers):
        with torch.no_grad(), walk.open_layer(layer) as module:
            hidden = captured.calls[position](module, hidden)
        _compare(layer, hidden, wanted[position])


def _outputs(model: Any, layers: Sequence[Layer], batch: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What every layer of `model` puts out on a batch, the first output where it returns several."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found.setdefault(name, output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [model.get_submodule(layer.name).register_forward_hook(keep(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            model(**arguments(batch), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(layer.name) for layer in layers]


def _compare(layer: Layer, driven: Tensor, inside: Tensor | None) -> None:
    if inside is None:
        raise StreamsDifferError(f"the model's forward pass does not run {layer.name}")
    if driven.shape != inside.shape:
        shapes = f"{tuple(driven.shape)}, and {tuple(inside.shape)} inside the model"
        raise StreamsDifferError(f"{layer.name}, driven by itself, puts out {shapes}")
    if not torch.equal(driven, inside):
        worst = float((driven.double() - inside.double()).abs().max())
        size = float(inside.double().abs().max())
        raise StreamsDifferError(
            f"{layer.name}, driven by itself, puts out something else than inside the model: "
            f"by {worst:.2g} at most, where the largest number is {size:.2g}"
        )
