"""Finds out how a model's layers are to be driven, and makes sure that this reproduces the model exactly.

Two rows of the first batch are run through the model as it is, its own weights read layer by layer: what its layers
are given and return says what form each has (forms.py). Then their calls are captured as they will be for every
batch, and compared: an argument that differs depends on the stream in a way that nobody drives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lillama.errors import LillamaError
from lillama.pretrained import predictions
from lillama.pretrained.calls import RawBatch, Stopped, arguments, digest, run_model, stand_in
from lillama.pretrained.driven import check_calls
from lillama.pretrained.examples import altered
from lillama.pretrained.forms import HINT, Form, Leaf, Record, find_forms
from lillama.pretrained.players import hand_on, main_output
from lillama.pretrained.walk import Walk

ROWS = 2
CLOSE = 1e-5  # of the largest number of the predictions: the same sums, on a GPU perhaps in another order


@torch.no_grad()
def learn_forms(walk: Walk, raw: RawBatch) -> dict[str, Form]:
    """Learn the forms of the layers of `walk`, leave them in its source, and return them.

    Raises LillamaError, which names the layer, where the layers cannot be driven one by one.
    """
    if not walk.layers:
        return {}
    batch: RawBatch = {name: value[:ROWS] for name, value in raw.items() if isinstance(value, Tensor)}
    whole = [layer.name for layer in walk.layers] == [layer.name for layer in walk.every]
    try:
        records, ending, expected = _watch(walk, batch, whole)
    except LillamaError:
        raise
    except Exception:  # rows that belong together, such as the codebooks of one piece of sound
        batch = raw
        records, ending, expected = _watch(walk, batch, whole)
    other = None
    if any(len([leaf for leaf in record.outputs if leaf.value]) > 1 for record in records):
        other, _, _ = _watch(walk, altered(batch), False)
    forms = find_forms(records, other)
    walk.source.forms = forms
    _compare(walk, batch, records)
    if whole:
        _compare_predictions(walk, batch, ending, expected)
    return forms


def _watch(walk: Walk, batch: RawBatch, whole: bool) -> tuple[list[Record], Any, Any]:
    """How every layer was called and what it returned; what the last returned, and what the model did (`whole`)."""
    records: list[Record] = []
    last: list[Any] = []
    device = walk.device.device
    with walk.hold_outside(predicts=whole) as model:
        modules = [model.get_submodule(layer.name) for layer in walk.layers]
        own = [module.forward for module in modules]

        def player(number: int) -> Any:
            def play(*args: Any, **kwargs: Any) -> Any:
                if number != len(records):
                    raise LillamaError(
                        "the model ran this layer out of the listed order, or more than once",
                        where=walk.layers[number].name,
                        hint="The plugin must list the layers in the order in which the model runs them, each once.",
                    )
                leaves, spec = pytree.tree_flatten((args, kwargs))
                before = tuple(map(_leaf, leaves))
                with walk.open_layer(walk.layers[number]):
                    out = own[number](*args, **kwargs)
                returned, returned_spec = pytree.tree_flatten(out)
                records.append(Record(walk.layers[number], before, spec, tuple(map(_leaf, returned)), returned_spec))
                if number == len(modules) - 1:
                    last.append(out)
                    if not whole:
                        raise Stopped
                return out

            return play

        given = {name: value.to(device) for name, value in arguments(batch).items()}
        result = None
        with (
            walk.device.autocast(),
            contextlib.suppress(Stopped),
            stand_in(modules, [*map(player, range(len(modules)))]),
        ):
            result = run_model(model, given, **(_few_positions(walk, given) if whole else {}))
    if len(records) < len(walk.layers):
        raise LillamaError(
            f"the model's forward pass reached {len(records)} of the {len(walk.layers)} layers listed",
            where=walk.layers[len(records)].name,
            hint="The plugin must list the layers in the order in which the model runs them.",
        )
    return records, last[0], result


def _few_positions(walk: Walk, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What asks for the predictions of positions all over the text, no more than are looked at at once elsewhere."""
    ids = given.get("input_ids")
    # A head that is a layer must be given what the layer before it puts out, all of it.
    if ids is None or ids.dim() != 2 or any(layer.kind == "head" for layer in walk.layers):
        return {}
    most = predictions.positions_at_once(walk.source.model, len(ids), predictions.READ)
    if most is None or most >= ids.shape[1]:
        return {}
    return {predictions.KEEP: torch.linspace(0, ids.shape[1] - 1, most).long()}


def _leaf(value: Any) -> Leaf:
    if isinstance(value, Tensor):
        return Leaf(digest(value), tuple(value.shape), value.dtype)
    return Leaf(None, said=value)


def _compare(walk: Walk, batch: RawBatch, records: Sequence[Record]) -> None:
    """LillamaError where a captured call has an argument that the model's own call had not."""
    with walk.capture() as capture, walk.device.autocast():
        captured, _ = capture(batch)
    check_calls(captured.calls, records)


def _compare_predictions(walk: Walk, batch: RawBatch, ending: Any, expected: Any) -> None:
    """LillamaError where the model makes something else of the last layer's output than it did."""
    device = walk.device.device
    with walk.hold_outside(predicts=True) as model:
        modules = [model.get_submodule(layer.name) for layer in walk.layers]
        players = [hand_on(walk.source.forms[layer.name]) for layer in walk.layers]
        given = {name: value.to(device) for name, value in arguments(batch).items()}
        with walk.device.autocast(), stand_in(modules, [*players[:-1], lambda *_, **__: ending]):
            found = run_model(model, given, **_few_positions(walk, given))
    mine, theirs = (main_output(one).float() for one in (found, expected))
    if mine.shape != theirs.shape or (mine - theirs).abs().max() > CLOSE * theirs.abs().max():
        raise LillamaError(
            "the model's predictions depend on more than what the last layer returns",
            where=walk.layers[-1].name,
            hint=HINT,
        )
