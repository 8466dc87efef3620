"""Tiny random models, compressed by lillama's own call, whose greedy tokens an engine must repeat.

Heads are 32 wide, the least that vLLM's attention on a CPU knows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import lillama

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GQA, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**GQA, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**GQA, tie_word_embeddings=True),
    "phi3": Phi3Config(**GQA, tie_word_embeddings=False),
    "opt": OPTConfig(**{**SMALL, "ffn_dim": 192, "word_embed_proj_dim": 128}),
    "mixtral": MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

Modules = dict[str, dict[str, Any]]


def tiny(name: str) -> Any:
    """A random model of a family, float32; biases are not zero, so that losing one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Wide enough apart that no rounding changes which token is the likeliest.
            parameter.normal_(std=0.3 if "embed" in key else 0.2) if parameter.dim() > 1 or "bias" in key else None
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One of eight words, and one for every other number of the vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(len(words), SMALL["vocab_size"])]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def linears(model: Any, how: dict[str, tuple[str, int]]) -> Modules:
    """The linears of the decoder's blocks by the last part of their names -> (storage, rank)."""
    return {
        name: {"kind": "linear", "storage": how[last][0], "rank": how[last][1]}
        for name, _ in model.named_modules()
        if (last := name.rpartition(".")[2]) in how
    }


def save(model: Any, modules: Modules, directory: Path, **options: Any) -> Path:
    """Compress `model` and save it, with a tokenizer."""
    lillama.factorise_(model, modules, **options.pop("factorise", {}))
    model.save_pretrained(directory, **options)
    tokenizer().save_pretrained(directory)
    return directory
