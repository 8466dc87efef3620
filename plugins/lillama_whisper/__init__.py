"""Whisper: the decoder's linears become low-rank; the encoder stays as it is, and speech calibrates (DESIGN 9).

Layers are the decoder's blocks. The encoder is run once per clip, before anything is distilled: its output travels
with the calibration batches. The output projection stays tied to the token embeddings.
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

MODEL_TYPE = "whisper"
ARCHITECTURE = "WhisperForConditionalGeneration"
# Linears by common input, in the order a block runs them. The keys and values of the cross-attention read the encoder.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("encoder_attn.q_proj",),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("encoder_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
NEURONS = ("fc1", "fc2")  # the MLP, whose neurons may be removed


@hookimpl
def auto_class(config: PreTrainedConfig) -> Any | None:
    # Its decoder alone, and its encoder with a classifier, are other models (WhisperForCausalLM).
    if config.model_type != MODEL_TYPE or (config.architectures or [ARCHITECTURE])[0] != ARCHITECTURE:
        return None
    from transformers import AutoModelForSpeechSeq2Seq

    return AutoModelForSpeechSeq2Seq


@hookimpl
def enumerate_layers(model: PreTrainedModel) -> list[Layer] | None:
    if model.config.model_type != MODEL_TYPE or type(model).__name__ != ARCHITECTURE:
        return None
    blocks = range(model.config.decoder_layers)
    return [Layer.of_linears(model, f"model.decoder.layers.{i}", GROUPS, NEURONS) for i in blocks]


@hookimpl
def calibration_stream(recipe: Recipe, progress: Progress) -> Sequence[dict[str, Tensor]]:
    from lillama_whisper.data import calibration_batches

    return calibration_batches(recipe, progress)


@hookimpl
def finetune_data(recipe: Recipe, progress: Progress) -> Sequence[dict[str, Any]]:
    from lillama_whisper.data import finetune_examples

    return finetune_examples(recipe, progress)
