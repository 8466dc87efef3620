"""Whether layers that are driven one by one compute what the model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lillama.base.device import send
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.pretrained.calls import arguments, run_model
from lillama.pretrained.forms import pack, unpack
from lillama.pretrained.learn import learn_forms
from lillama.pretrained.walk import Walk
from lillama.run.prepare import Prepared

# Of a layer's largest number: a kernel may add in another order where a tensor lies elsewhere in memory (7.5e-9 of 0.36
# was seen on a processor with AVX-512). What a layer is really driven wrongly by is a hundred times that and more.
CLOSE = 1e-5


class StreamsDifferError(AssertionError):
    """A layer driven by itself put out something else than it does inside the model."""


def check_streams(prepared: Prepared, model: Any, batch: Mapping[str, Tensor]) -> None:
    """Assert that driving the layers of `prepared` one by one gives what `model` gives at every layer.

    But for the rounding of float32, which differs by where a tensor lies.

    `model` is the whole original, on the device of `prepared`, in the type of `prepared.source.working`; the source was
    fetched, and the plugin's `prepare` was called on both. `batch` holds the model's forward arguments. Raises
    StreamsDifferError, which names the first layer that differs.
    """
    source, layers = prepared.source, prepared.layers
    walk = Walk(source, layers, layers, prepared.device, Progress())
    learn_forms(walk, batch)
    wanted = _outputs(model, layers, batch)
    with walk.capture() as capture:
        captured, hidden = capture(batch)
    parts = unpack(hidden, captured.calls[0].shapes)
    for position, layer in enumerate(layers):
        call = captured.calls[position]
        with torch.no_grad(), walk.open_layer(layer) as module:
            hidden = call(module, hidden)
        made = wanted[position]
        if made is not None:
            parts = [parts[part.kept or 0] if part.made is None else made[part.made] for part in call.form.gives]
        _compare(layer, hidden, None if made is None else pack(parts))


def _outputs(model: Any, layers: Sequence[Layer], batch: Mapping[str, Tensor]) -> list[list[Any] | None]:
    """What every layer of `model` puts out on a batch, flattened."""
    found: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found.setdefault(name, pytree.tree_leaves(output))

        return hook

    hooks = [model.get_submodule(layer.name).register_forward_hook(keep(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            run_model(model, {name: send(value, model.device) for name, value in arguments(batch).items()})
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
    worst = float((driven.double() - inside.double()).abs().max())
    size = float(inside.double().abs().max())
    if not worst <= CLOSE * size:  # nor where one of them is no number
        raise StreamsDifferError(
            f"{layer.name}, driven by itself, puts out something else than inside the model: "
            f"by {worst:.2g} at most, where the largest number is {size:.2g}"
        )
