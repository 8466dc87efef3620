"""The models that are served, and what transformers says to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import linears, save, tiny

import lillama
from lillama.checkpoint.quantizer import describe_
from lillama.lowrank.narrow import narrow
from lillama.pretrained import sharing

NEW = 16
PROMPTS = [[4 + (7 * i + 3 * j) % 8 for j in range(5 + i % 3)] for i in range(8)]
# Both storages and several ranks in what the engine merges (q, k, v; gate, up), and v dense.
MIXED = {
    "q_proj": ("factors", 32),
    "k_proj": ("pivoted", 24),
    "o_proj": ("factors", 40),
    "gate_proj": ("pivoted", 64),
    "up_proj": ("factors", 48),
    "down_proj": ("pivoted", 56),
}

# The same in few bits, groups that a second process cuts (down_proj has 96 of 192 inputs in each) among them.
BITS = {
    "q_proj": ("factors:4:32", 32),
    "k_proj": ("pivoted:8:64", 24),
    "v_proj": ("dense:4:64", 64),
    "o_proj": ("factors:8:128", 40),
    "gate_proj": ("pivoted:4:32", 64),
    "up_proj": ("dense:8:32", 128),
    "down_proj": ("pivoted:4:64", 56),
}


def _mixed(family: str) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        model = tiny(family)
        modules = linears(model, MIXED)
        del modules["model.layers.1.self_attn.q_proj"]
        modules["model.layers.0.self_attn.v_proj"] = {"kind": "linear", "storage": "pivoted", "rank": 16}
        return save(model, modules, directory, max_shard_size="300KB")

    return build


def _fused(directory: Path) -> Path:
    model = tiny("phi3")
    ranks = {"qkv_proj": ("pivoted", 64), "gate_up_proj": ("pivoted", 72), "down_proj": ("factors", 64)}
    return save(model, linears(model, ranks), directory)


def _vocabulary(storage: str, tied: bool) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        model = tiny("llama-tied" if tied else "llama")
        head: dict[str, Any] = {"kind": "linear", "storage": storage, "rank": 40 if tied else 32}
        if tied:
            head["tied"] = "model.embed_tokens"
        modules = {"model.embed_tokens": {"kind": "embedding", "storage": storage, "rank": 40}, "lm_head": head}
        return save(model, modules, directory)

    return build


def _shared(directory: Path) -> Path:
    """As InkubaLM is: low rank in embedding and head, and one MLP in every block, of which the file holds one."""
    model = tiny("llama-bias")
    groups = [["model.layers.0.mlp", "model.layers.1.mlp"]]
    sharing.share(model, groups)
    sharing.tell(model, sharing.aliases(model, groups))
    modules = {
        "model.embed_tokens": {"kind": "embedding", "storage": "pivoted", "rank": 40},
        "lm_head": {"kind": "linear", "storage": "pivoted", "rank": 40},
        **linears(model, {"q_proj": ("factors", 32)}),
    }
    return save(model, modules, directory, factorise={"shared": groups})


def _experts(storage: str, **ranks: int) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        model = tiny("mixtral")
        modules = linears(model, {"q_proj": ("pivoted", 64)})
        for name, _ in model.named_modules():
            if name.endswith(".experts") and not (storage == "factors" and ".0." in name):
                for projection, rank in ranks.items():
                    modules[f"{name}.{projection}"] = {"kind": "experts", "storage": storage, "rank": rank}
        return save(model, modules, directory)

    return build


def _bits(family: str) -> Callable[[Path], Path]:
    """Every form in 4 and in 8 bits, beside others in what is merged; embedding and head are one table of 8 bits."""

    def build(directory: Path) -> Path:
        model = tiny(family)
        modules = linears(model, BITS)
        modules["model.layers.1.self_attn.q_proj"] = {"kind": "linear", "storage": "pivoted", "rank": 32}
        del modules["model.layers.1.mlp.up_proj"]
        table = {"storage": "dense:8:32", "rank": 97}
        modules["model.embed_tokens"] = {"kind": "embedding", **table}
        modules["lm_head"] = {"kind": "linear", **table, "tied": "model.embed_tokens"}
        return save(model, modules, directory, max_shard_size="100KB")

    return build


def _bits_apart(directory: Path) -> Path:
    """Embedding and head of low rank in few bits, each for itself, and all else dense in few bits."""
    model = tiny("llama-bias")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules = linears(model, dict.fromkeys(names, ("dense:4:64", 0)))
    for name, how in modules.items():
        how["rank"] = min(model.get_submodule(name).weight.shape)
    modules["model.embed_tokens"] = {"kind": "embedding", "storage": "pivoted:8:64", "rank": 40}
    modules["lm_head"] = {"kind": "linear", "storage": "factors:4:32", "rank": 40}
    return save(model, modules, directory)


def _bits_experts(directory: Path) -> Path:
    model = tiny("mixtral")
    modules = linears(model, {"q_proj": ("dense:8:64", 128)})
    forms = {"gate": ("factors:4:32", 32), "up": ("dense:4:32", 128), "down": ("pivoted:8:128", 48)}
    for name, _ in model.named_modules():
        if name.endswith(".experts"):
            for projection, (storage, rank) in forms.items():
                modules[f"{name}.{projection}"] = {"kind": "experts", "storage": storage, "rank": rank}
    return save(model, modules, directory)


def _narrow(family: str) -> Callable[[Path], Path]:
    """MLPs that lost neurons, not as many in each block: dense, of low rank, and one in few bits."""

    def build(directory: Path) -> Path:
        model = tiny(family)
        shapes = {}
        for number, left in enumerate((80, 152)):
            for name in ("gate_proj", "up_proj", "down_proj"):
                linear = model.get_submodule(f"model.layers.{number}.mlp.{name}")
                is_exit = name == "down_proj"
                weight = linear.weight.detach()[:, :left] if is_exit else linear.weight.detach()[:left]
                bias = linear.bias if linear.bias is None or is_exit else linear.bias.detach()[:left]
                shapes[f"model.layers.{number}.mlp.{name}"] = list(weight.shape)
                narrow(model, f"model.layers.{number}.mlp.{name}", weight.shape, weight.clone(), bias)
        modules = linears(model, {"q_proj": ("pivoted", 64), "down_proj": ("pivoted", 56)})
        modules["model.layers.0.mlp.gate_proj"] = {"kind": "linear", "storage": "pivoted", "rank": 48}
        modules["model.layers.1.mlp.up_proj"] = {"kind": "linear", "storage": "dense:8:32", "rank": 128}
        save(model, modules, directory)
        describe_(model, modules, shapes=shapes).save_pretrained(directory)
        return directory

    return build


MODELS = {
    "narrow": _narrow("llama"),
    "mixed": _mixed("llama"),
    "biases": _mixed("llama-bias"),
    "qwen2": _mixed("qwen2"),
    "fused": _fused,
    "embedding": _vocabulary("factors", tied=False),
    "tied": _vocabulary("factors", tied=True),
    "tied-pivoted": _vocabulary("pivoted", tied=True),
    "shared": _shared,
    "experts": _experts("factors", gate=32, up=40, down=48),  # dense ones in the first block
    "experts-pivoted": _experts("pivoted", gate=32, down=48),  # `up` stays dense
    "bits": _bits("llama-tied"),
    "bits-apart": _bits_apart,
    "bits-experts": _bits_experts,
}


def tokens(directory: Path) -> list[list[int]]:
    """The NEW likeliest tokens after each prompt, by transformers in float32."""
    # transformers 5.19 leaves what it renames while it reads, experts, in the type of the file.
    model = lillama.load(directory, dtype=torch.float32).float().eval()
    return [_greedy(model, torch.tensor([prompt])) for prompt in PROMPTS]


def _greedy(model: Any, ids: torch.Tensor) -> list[int]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found
