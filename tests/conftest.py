"""Tiny models and data that every test can build: no network, nothing from outside the project."""

from __future__ import annotations

import copy
import os

# Two workers share the machine: a thread each, and none that spins while it waits.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("lillama", deadline=None)
hypothesis.settings.load_profile("lillama")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GQA, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": MistralConfig(**GQA, sliding_window=6, tie_word_embeddings=False),
    "phi": PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**GQA, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**GQA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True),
}


def tiny(name: str = "llama", seed: int = 0):
    """A randomly initialised model of a family, float32, eval. Biases are not zero, so that losing one shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of eight words."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: i + 4 for i, w in enumerate(WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(autouse=True)
def _without_reports(request, monkeypatch):
    """Reports take half a second each: drawn where a test is marked `report` alone."""
    if not request.node.get_closest_marker("report"):
        monkeypatch.setattr("lillama.report.html.write", lambda path: path / "report.html")
