"""Makes the checkpoints of this folder: one of every kind of weight and storage, as format version 1 has them.

    python tests/golden/make.py DIRECTORY
    python tests/golden/make.py --few-bits tests/golden
    python tests/golden/make.py --curves tests/golden/curves.json

They were made by the code before the package had rooms (commit b66e734) and are not made again: every later version has
to load them (tests/test_golden.py). A new version of the format adds its own beside them. Every case leaves
`NAME/model` and `NAME/expected.safetensors` (the model's arguments, and the logits in float32); `run` is a whole
finished run directory, and `run/original-model` the model it compressed.

`--few-bits` makes those of format version 2 out of some of the others (first done after commit 6ef22fc).

`--curves` writes how the held-out losses of the layers of one tiny model of each family fall, which
tests/faults/test_golden_curves.py compares with. Make it again only for a change that is meant to change them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lillama
from lillama.base.device import choose
from lillama.base.progress import Progress
from lillama.bits.stage import quantise_model
from lillama.recipe.schema import Quantize
from lillama.testing import recipe_for, token_batches

SMALL = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


def inkuba():
    """One MLP in all blocks, told by the name of its class."""
    model = llama(tie_word_embeddings=False)
    model.config.architectures = ["InkubaLM"]
    for layer in model.model.layers[1:]:
        layer.mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    return model


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2))


def mamba():
    settings = {"vocab_size": 53, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**settings, use_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def whisper():
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 53, "num_mel_bins": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    places = {"max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 3}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": [], "begin_suppress_tokens": []}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **layers, **places, **ends))


def heard(model):
    """Batches for Whisper: noise, and tokens for the decoder."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(2, 8, 40, generator=generator),
            "decoder_input_ids": torch.randint(3, 53, (2, 8), generator=generator),
        }
        for _ in range(3)
    ]


SCHEDULES = ("sequential", "concurrent")

# name: (model, plugin, settings)
CASES = {
    "linear-factors": (lambda: llama(attention_bias=True, mlp_bias=True), "decoder", {"compress.storage": "factors"}),
    "linear-pivoted": (lambda: llama(attention_bias=True, mlp_bias=True), "decoder", {"compress.storage": "pivoted"}),
    "tied-factors": (lambda: llama(tie_word_embeddings=True), "inkuba", {"compress.storage": "factors"}),
    "tied-pivoted": (lambda: llama(tie_word_embeddings=True), "inkuba", {"compress.storage": "pivoted"}),
    "shared-pivoted": (inkuba, "inkuba", {"compress.storage": "pivoted"}),
    "experts-factors": (mixtral, "mixtral", {"compress.storage": "factors"}),
    "experts-pivoted": (mixtral, "mixtral", {"compress.storage": "pivoted", "distill.train": "layer"}),
    "mamba-pivoted": (mamba, "mamba", {"compress.storage": "pivoted"}),
    "whisper-factors": (whisper, "whisper", {"compress.storage": "factors", "compress.init": "svd"}),
}


def make(model, plugin, settings, target: Path, keep_run: bool = False) -> None:
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    batches = heard(model) if model.config.is_encoder_decoder else token_batches(model, length=8)
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        original, out = Path("original-model"), Path("run")
        model.save_pretrained(original)
        changes = {"compress.reduction": 0.2, "distill.schedule": "sequential"} | settings
        result = lillama.compress(recipe_for(original, out, plugin, changes), batches=batches)
        shutil.copytree(out if keep_run else result.path, target / ("" if keep_run else "model"))
        if keep_run:
            shutil.copytree(original, target / original)
            (target / "report.html").unlink()
    loaded = lillama.load(target / "model").eval()
    with torch.no_grad():
        logits = loaded(**batches[0]).logits.float()
    save_file(batches[0] | {"logits": logits.contiguous()}, target / "expected.safetensors")


# name: (which of the others, bits)
FEW = {
    "few-tied-pivoted": ("tied-pivoted", 4),
    "few-experts": ("experts-factors", 4),
    "few-linear": ("linear-factors", 8),
}


def few_bits(directory: Path) -> None:
    for name, (other, bits) in FEW.items():
        model = lillama.load(directory / other / "model").eval()
        offered = [(n, "linear") for n, module in model.named_modules() if type(module) is torch.nn.Linear]
        section = Quantize(bits=bits, what="all", embedding=bits, method="nearest")
        quantise_model(model, section, offered=offered, device=choose("cpu", "float32"), progress=Progress())
        model.save_pretrained(directory / name / "model")
        held = load_file(directory / other / "expected.safetensors")
        held.pop("logits")
        with torch.no_grad():
            logits = model(**held).logits.float()
        save_file(held | {"logits": logits.contiguous()}, directory / name / "expected.safetensors")


# family: (model, plugin, settings)
CURVES = {
    "llama": (llama, "decoder", {"compress.init": "random", "compress.storage": "pivoted"}),
    "inkuba": (inkuba, "inkuba", {"compress.init": "random", "compress.reduction": 0.4}),
    "mixtral": (mixtral, "mixtral", {"compress.init": "random", "distill.clip_norm": 0.5}),
    "mamba": (mamba, "mamba", {"compress.init": "random", "distill.objective": "normalised_mse"}),
    "whisper": (whisper, "whisper", {"compress.init": "random", "distill.objective": "mse"}),
}


def filled(model):
    """The model with weights that no version of transformers draws otherwise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            gain = name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + gain)
    return model.float().eval()


def curve(family: str, schedule: str) -> dict[str, list[float]]:
    """The held-out losses of every layer of a short run: at the start, then after every step."""
    build, plugin, settings = CURVES[family]
    torch.manual_seed(0)
    model = filled(build())
    batches = heard(model) if model.config.is_encoder_decoder else token_batches(model, length=8)
    steps = {"distill.epochs": 4, "distill.checks": 8, "distill.learning_rate": 1e-2, "compress.reduction": 0.3}
    with tempfile.TemporaryDirectory() as work:
        original, out = Path(work) / "model", Path(work) / "run"
        model.save_pretrained(original)
        changes = steps | {"distill.schedule": schedule} | settings
        lillama.compress(recipe_for(original, out, plugin, changes), batches=batches)
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    first = {event["layer"]: event["initial_loss"] for event in events if event["event"] == "layer"}
    checks = [event for event in events if event["event"] == "check"]
    return {
        name: [float(f"{x:.6g}") for x in (loss, *(e["held_out_loss"] for e in checks if e["layer"] == name))]
        for name, loss in first.items()
    }


def curves(file: Path) -> None:
    found = {family: {schedule: curve(family, schedule) for schedule in SCHEDULES} for family in CURVES}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(directory: Path) -> None:
    for name, (build, plugin, settings) in CASES.items():
        torch.manual_seed(0)
        make(build(), plugin, settings, directory / name)
    torch.manual_seed(0)
    make(llama(), "decoder", {"compress.storage": "pivoted", "distill.train": "layer"}, directory / "run", True)


if __name__ == "__main__":
    if sys.argv[1] == "--curves":
        curves(Path(sys.argv[2]))
    elif sys.argv[1] == "--few-bits":
        few_bits(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]).resolve())
