"""Mixtral: decoder blocks whose MLP is a router and stacked experts.

Attention's linears and the experts' gate, up and down may be factorised. The router stays dense; it learns with its
layer where the recipe says `distill.train: layer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lillama import Layer, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))


@hookimpl
def enumerate_layers(model: PreTrainedModel) -> list[Layer] | None:
    if model.config.model_type != "mixtral":
        return None
    return [layer(model, f"model.layers.{i}") for i in range(model.config.num_hidden_layers)]


def layer(model: PreTrainedModel, name: str) -> Layer:
    """A block: attention by common input, then every projection of its experts as one stacked weight."""
    attention = Layer.of_linears(model, name, ATTENTION).weights
    return Layer(name, attention + Layer.of_experts(model, f"{name}.mlp.experts"))
