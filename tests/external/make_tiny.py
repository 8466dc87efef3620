"""Writes ./tiny, a GPT-NeoX of random weights with a tokenizer of twelve words, and ./text.txt to calibrate it on."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]


def main() -> None:
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>").save_pretrained("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained("tiny")
    draw = random.Random(0)
    Path("text.txt").write_text("".join(" ".join(draw.choices(WORDS, k=12)) + "\n" for _ in range(60)))


if __name__ == "__main__":
    main()
