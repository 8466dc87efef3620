"""Decoder-only transformers whose blocks are made of plain linears: Llama, Mistral, Phi, Phi-3 and kin.

Every linear of a block may be factorised; biases stay (on the output side), fused projections stay fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lillama import Layer, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Linears by common input, in the order a block runs them.
LLAMA = (ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    # Phi-2's attention and MLP read the same normalised input, side by side.
    "phi": ((*ATTENTION, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)),
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
}
# The linears of an MLP whose neurons may be removed, the one that ends it last. Phi-3's gate and up are one matrix.
NEURONS = {
    "phi": ("mlp.fc1", "mlp.fc2"),
    "phi3": (),
}


@hookimpl
def enumerate_layers(model: PreTrainedModel) -> list[Layer] | None:
    groups = FAMILIES.get(model.config.model_type)
    if groups is None:
        return None
    neurons = NEURONS.get(model.config.model_type, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
    blocks = range(model.config.num_hidden_layers)
    return [Layer.of_linears(model, f"model.layers.{i}", groups, neurons) for i in blocks]
