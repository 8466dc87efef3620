"""Speed of models whose linears lost a share of their numbers, beside the originals: ratios, in one run.

    python benchmarks/speed.py                                  # both shapes, pivoted, 25 % removed, 2 threads
    python benchmarks/speed.py --shapes wide --storage factors --rounds 9 --layers 4

`narrow` has blocks of SmolLM2-135M (width 576), `wide` such of width 2048 (their MLP is 5632). Weights are random and
the vocabulary is small, so that blocks are what is timed: a prompt of 512 tokens, and tokens one by one. Original and
compressed take turns, prompt by prompt and token by token, since a machine that others use changes its pace; a ratio
is that of two neighbours, and the median and the quartiles of all are printed, with the ratio of the blocks' numbers,
which is what the same work per number would give. `--processor` counts the processor's seconds instead of the clock's:
steadier on a machine that others use, and blind to waiting.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lillama.base.device import machine
from lillama.checkpoint.quantizer import place_factors
from lillama.contract import Layer
from lillama.evaluate.speed import prompts
from lillama.evaluate.turns import alternating
from lillama.lowrank.swap import factor_modules, lay_out
from lillama.plan.plan import choose_ranks
from lillama.recipe.schema import Compress

SHAPES = {
    "narrow": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 32},
}
LAYERS = {"narrow": 8, "wide": 2}  # more than any cache holds
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def original(shape: str, layers: int) -> LlamaForCausalLM:
    """A random model."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=2048)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def compressed(model: LlamaForCausalLM, storage: str, removed: float) -> LlamaForCausalLM:
    """A random model of its shape with factors; what is in them does not matter."""
    count = len(model.model.layers)
    small = LlamaForCausalLM(model.config).eval()
    layers = [Layer.of_linears(small, f"model.layers.{i}", GROUPS) for i in range(count)]
    wanted = Compress(reduction=removed, of="weights", strategy="uniform", storage=storage)
    place_factors(small, choose_ranks(layers, small.num_parameters(), wanted).modules())
    with torch.no_grad():
        for _, module in factor_modules(small):
            for parameter in module.parameters():
                parameter.normal_(std=0.02)
            for buffer in module.buffers():
                buffer.copy_(torch.randperm(module.out_features)[: len(buffer)])
    lay_out(small)  # as loading does
    return small.requires_grad_(False)


def numbers(model: LlamaForCausalLM) -> int:
    """How many numbers the blocks hold."""
    return sum(p.numel() for p in model.model.layers.parameters())


Times = list[list[float]]  # seconds, by model
now = time.perf_counter


def prefill(models: Sequence[Any], prompt: torch.Tensor, rounds: int) -> Times:
    """Seconds of reading the prompt, `rounds` times."""
    times: Times = [[] for _ in models]
    for _, order in alternating(len(models), rounds):
        for which in order:
            start = now()
            models[which](prompt, logits_to_keep=1)
            times[which].append(now() - start)
    return times


def decode(models: Sequence[Any], prompt: torch.Tensor, tokens: int) -> Times:
    """Seconds of every token after the prompt."""
    times: Times = [[] for _ in models]
    caches = [model(prompt, use_cache=True, logits_to_keep=1).past_key_values for model in models]
    for _, order in alternating(len(models), tokens):
        for which in order:
            start = now()
            models[which](prompt[:, :1], past_key_values=caches[which], use_cache=True)
            times[which].append(now() - start)
    return times


def show(phase: str, times: Times, skip: int) -> None:
    """Print the ratio; the first `skip` measurements warm up."""
    first, other = (one[skip:] for one in times)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(first, other)], n=4)
    print(f"  {phase:8} x {middle:.3f} ({low:.3f} to {high:.3f}); the original {statistics.median(first) * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of models whose linears lost a share of their numbers.")
    parser.add_argument("--shapes", default="narrow,wide", help="narrow, wide, or both with a comma")
    parser.add_argument("--storage", default="pivoted")
    parser.add_argument("--removed", type=float, default=0.25, help="share of the linears' numbers")
    parser.add_argument("--layers", type=int, help="blocks (8 narrow, 2 wide)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=15, help="prompts read by each")
    parser.add_argument("--tokens", type=int, default=200, help="tokens after a prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, not of the clock")
    args = parser.parse_args()
    if args.processor:
        global now
        now = time.process_time
    torch.set_num_threads(args.threads)
    print(f"{machine()}, {args.threads} threads, torch {torch.__version__}, float32, {args.storage}")
    for shape in args.shapes.split(","):
        big = original(shape, args.layers or LAYERS[shape])
        models = big, compressed(big, args.storage, args.removed)
        count, left = map(numbers, models)
        print(f"{shape}: numbers {count:,} -> {left:,}, x {count / left:.3f}", flush=True)
        prompt = prompts(big, 1, args.length, 0, "cpu")
        with torch.inference_mode():
            show("prefill", prefill(models, prompt, args.rounds + 1), 1)
            show("decode", decode(models, prompt[:, :32], args.tokens + 8), 8)


if __name__ == "__main__":
    main()
