"""Mamba and Falcon-Mamba: the in_proj and out_proj of every block.

x_proj, dt_proj and the convolution stay dense: they are small, and the step sizes that come out of them are
sensitive. Without CUDA kernels the blocks run a scan whose backward is linear in length (`lillama_mamba.scan`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lillama import Layer, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("mamba", "falcon_mamba")
GROUPS = (("mixer.in_proj",), ("mixer.out_proj",))


@hookimpl
def enumerate_layers(model: PreTrainedModel) -> list[Layer] | None:
    if model.config.model_type not in FAMILIES:
        return None
    return [Layer.of_linears(model, f"backbone.layers.{i}", GROUPS) for i in range(model.config.num_hidden_layers)]


@hookimpl
def prepare(model: PreTrainedModel) -> None:
    from lillama_mamba.scan import use_linear_scan

    use_linear_scan(model)


@hookimpl
def doctor() -> list[str]:
    from lillama_mamba.scan import path_in_use

    return [path_in_use()]
