"""What plays a model's layers in a forward pass where they themselves need not run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lillama.pretrained.calls import HIDDEN, Call, give_back, stand_in
from lillama.pretrained.forms import Form, unpack

# The outputs of models that say what they predict, in the order of preference.
PREDICTIONS = ("logits", "prediction_logits", "last_hidden_state")


def hand_on(form: Form | None) -> Callable[..., Any]:
    """What plays a layer of that form (None: nobody looked): it gives back what it is given."""

    def play(*args: Any, **kwargs: Any) -> Any:
        if form is None or form.spec is None:
            return args[0] if args else kwargs[HIDDEN]
        return give_back(form, pytree.tree_leaves((args, kwargs)), {}, {})

    return play


def end_with(
    modules: Sequence[nn.Module], forms: Sequence[Form | None], call: Call, stream: Tensor
) -> contextlib.AbstractContextManager[None]:
    """Let `modules` hand on what they get, and the last one, which was called by `call`, give `stream`."""

    def end(*args: Any, **kwargs: Any) -> Any:
        form = forms[-1]
        if form is None or form.spec is None:
            return stream
        parts = unpack(stream, call.after)
        made = {part.made: one for part, one in zip(form.gives, parts) if part.made is not None}
        return give_back(form, pytree.tree_leaves((args, kwargs)), made, {})

    return stand_in(modules, [*map(hand_on, forms[:-1]), end])


def main_output(outputs: Any) -> Tensor:
    """What a model predicts: its logits, or its features where it has no head."""
    for name in PREDICTIONS:
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    leaves = (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return next(leaf for leaf in leaves if leaf.is_floating_point())


def predicts_classes(outputs: Any) -> bool:
    """Whether what a model puts out are logits, and not features."""
    return any(isinstance(getattr(outputs, name, None), Tensor) for name in PREDICTIONS[:2])
