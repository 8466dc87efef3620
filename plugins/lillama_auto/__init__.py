"""Any model of transformers: blocks and groups are found by tracing one forward pass. Asked when nobody else knows it.

A recipe names it with `plugin: traced`. What it finds is verified on the model's own weights before anything learns:
driving the blocks one by one must reproduce the model, else the run ends with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lillama import Layer, hookimpl

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from lillama import Recipe
    from lillama.base.progress import Progress


@hookimpl(trylast=True)
def auto_class(config: PreTrainedConfig) -> Any | None:
    from lillama_auto.classes import find_class

    return find_class(config)


@hookimpl(trylast=True)
def enumerate_layers(model: PreTrainedModel) -> list[Layer] | None:
    from lillama.pretrained.trace import trace

    return trace(model)


@hookimpl
def calibration_stream(
    model: PreTrainedModel, recipe: Recipe, progress: Progress
) -> Sequence[dict[str, Tensor]] | None:
    from lillama_auto.data import calibration_batches

    return calibration_batches(model, recipe, progress)
