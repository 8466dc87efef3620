"""The plugin contract, whole. A plugin for an ordinary decoder is `enumerate_layers` alone.

Implement a hook by decorating a function of the same name with `lillama.hookimpl`; leave out arguments
you do not use. Register the module in the entry-point group `lillama`. See docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from lillama.contract import Layer
    from lillama.recipe import Recipe
    from lillama.registry import Registries

hookspec = pluggy.HookspecMarker("lillama")
hookimpl = pluggy.HookimplMarker("lillama")


@hookspec(firstresult=True)
def enumerate_layers(model: PreTrainedModel, recipe: Recipe) -> list[Layer] | None:
    """The layers of `model` (a skeleton on the meta device) in execution order; None: not mine."""


@hookspec(firstresult=True)
def calibration_stream(model: PreTrainedModel, recipe: Recipe) -> Iterable[dict[str, Tensor]] | None:
    """Batches of the model's forward arguments; None: the host's own reader for text serves.

    A batch may carry `loss_mask` (1 where a position counts); else `attention_mask` plays that part.
    """


@hookspec
def evaluate(model: PreTrainedModel, recipe: Recipe) -> dict[str, float] | None:
    """Metrics named `task/metric`, beside those of the recipe's own `evaluate:` section."""


@hookspec(firstresult=True)
def auto_class(config: PreTrainedConfig, recipe: Recipe) -> Any | None:
    """The transformers auto class that opens this model; None: AutoModelForCausalLM."""


@hookspec
def register(registries: Registries) -> None:
    """Add strategies, initialisers, objectives, losses or evaluators under names of your own."""
