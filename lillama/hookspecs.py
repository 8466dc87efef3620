"""The plugin contract, whole. A plugin for an ordinary decoder is `enumerate_layers` alone.

Implement a hook by decorating a function of the same name with `lillama.hookimpl`; leave out arguments
you do not use. Register the module in the entry-point group `lillama`. See docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from lillama.base.progress import Progress
    from lillama.contract import Layer
    from lillama.recipe.schema import Recipe
    from lillama.registry import Registries

hookspec = pluggy.HookspecMarker("lillama")
hookimpl = pluggy.HookimplMarker("lillama")


@hookspec(firstresult=True)
def enumerate_layers(model: PreTrainedModel, recipe: Recipe | None, asked: bool) -> list[Layer] | None:
    """The layers of `model` (a skeleton on the meta device) in execution order; None: not mine.

    `asked`: the plugin was chosen by its name (`plugin:`). `recipe` is None here and in every hook that says so where
    a model is evaluated that no run made.
    """


@hookspec(firstresult=True)
def calibration_stream(
    model: PreTrainedModel, recipe: Recipe, progress: Progress
) -> Iterable[dict[str, Tensor]] | None:
    """Batches of the model's forward arguments; None: the host's own reader for text serves.

    A batch may carry `loss_mask` (1 where a position counts; else `attention_mask` plays that part), and `digest`
    (bytes of a hash that stands for its floating-point tensors when a run is resumed).
    """


@hookspec(firstresult=True)
def finetune_data(model: PreTrainedModel, recipe: Recipe, progress: Progress) -> Sequence[dict[str, Tensor]] | None:
    """Examples for the recipe's `finetune:`, one clip or text each: forward arguments without a batch dimension.

    Each holds `labels` (-100 where nothing is learned); tensors of one dimension are padded to a batch, others
    stacked. Those with an equal `source` (any text) are held out together. `model` is the skeleton. None: the host's
    own text blocks serve a causal model.
    """


@hookspec
def evaluate(model: PreTrainedModel, recipe: Recipe | None) -> dict[str, float] | None:
    """Metrics named `task/metric`, beside those of the recipe's own `evaluate:` section."""


@hookspec(firstresult=True)
def auto_class(config: PreTrainedConfig, recipe: Recipe | None) -> Any | None:
    """The transformers auto class that opens this model; None: AutoModelForCausalLM."""


@hookspec(firstresult=True)
def configuration(config: dict[str, Any]) -> PreTrainedConfig | None:
    """The configuration for what a model's config.json says; None: transformers reads it itself.

    For a model that comes with code of its own though transformers has its architecture: that code is not run then.
    """


@hookspec(firstresult=True)
def shared_modules(model: PreTrainedModel, recipe: Recipe | None) -> Sequence[Sequence[str]] | None:
    """Groups of modules of `model` that are one and the same, by name, the one to be stored first.

    The copies in a checkpoint must be equal. They are counted once, saved once, and are still one after loading.
    """


@hookspec
def register(registries: Registries) -> None:
    """Add strategies, initialisers, objectives, losses, schedules, storages, data readers, exports, report figures or
    evaluators under names of your own: `registries.losses.add("mine", function)`.

    Called once, before anything is looked up. A function that names what nothing is given for is refused.
    """


@hookspec
def prepare(model: PreTrainedModel, recipe: Recipe | None) -> None:
    """Make `model` run as it should here: the skeleton before distillation, a loaded model before evaluation.

    For a forward that is faster and equal, say. Change instances (`module.forward`), never classes: a student is a
    deep copy of its layer. Outputs, parameters and their names must stay the same; no weight may be read.
    """


@hookspec
def doctor() -> list[str] | None:
    """Lines that `lillama doctor` shows: which kernels or code paths of yours are in use on this machine."""
