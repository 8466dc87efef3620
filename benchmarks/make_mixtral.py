"""Write a synthetic Mixtral in the hub's format: random bfloat16 weights, sharded, a tokenizer beside them.

    python benchmarks/make_mixtral.py DIR                      # 4 GB: 30 layers of width 1024, 8 experts of 2560
    python benchmarks/make_mixtral.py DIR --layers 2 --hidden 64 --inner 128

One tensor is in memory at a time. Weights are normal, std 0.02, names `block_sparse_moe.experts.N.w1/w2/w3`.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MixtralConfig, PreTrainedTokenizerFast

from lillama.base import tensorfile

VOCABULARY = 32000


def shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the hub's format."""
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, out in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (out, hidden)
        found[f"{layer}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                found[f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def write(directory: Path, config: MixtralConfig, shard_bytes: int) -> int:
    """Write configuration, shards, index and tokenizer; the number of parameters."""
    directory.mkdir(parents=True)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(directory)
    shards: list[list[tensorfile.Entry]] = [[]]
    for name, shape in shapes(config).items():
        entry = tensorfile.Entry(name, shape, torch.bfloat16, functools.partial(values, name, shape))
        if sum(e.bytes for e in shards[-1]) + entry.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensorfile.write(directory / file, shard, {"format": "pt"})
        weight_map |= {e.name: file for e in shard}
    total = sum(e.bytes for shard in shards for e in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    # A token per byte, the rest of the vocabulary unused.
    letters = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2} | letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return total // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2560)
    parser.add_argument("--shard", type=float, default=1.0, help="GB per file")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(options.hidden // 256, 1),
        num_local_experts=8,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    numbers = write(options.directory, config, int(options.shard * 1e9))
    print(f"{numbers:,} parameters, {2 * numbers / 1e9:.2f} GB in {options.directory}")


if __name__ == "__main__":
    main()
