"""A tiny model of each family with a recipe that goes through every phase: for what tries to break a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import speech_models
import torch
from conftest import GQA, tiny, tokenizer
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

NAMES = ("llama", "mixtral", "mamba", "whisper", "inkuba")
SCHEDULES = ("sequential", "concurrent")


def _inkuba():
    """One MLP in all blocks, told by the name of its class."""
    model = tiny("mistral")
    model.config.architectures = ["InkubaLM"]
    for layer in model.model.layers[1:]:
        layer.mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    return model


def _mixtral():
    torch.manual_seed(0)
    sizes = {**GQA, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))


def _mamba():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes, use_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))


MODELS = {"llama": lambda: tiny("llama"), "mixtral": _mixtral, "mamba": _mamba, "inkuba": _inkuba}

RECIPE = """
model: {{id: {home}/model, dtype: float32}}
compress: {{reduction: 0.2, of: weights, rank_multiple: 2}}
distill: {{schedule: {schedule}, batch_size: 2, loss: {loss}, checks: 3, holdout: 0.2}}
calibration: {{dataset: {home}/data{suffix}, sequence_length: 16, tokens: 640}}
finetune: {{steps: 6, batch_size: 2, sequence_length: 16, tokens: 256, checks: 3, learning_rate: 1e-3}}
quantize: {{bits: 4, what: all, tokens: 256}}
evaluate: {{{evaluate}}}
run: {{out: {home}/run, device: cpu, compute: float32, snapshot_seconds: 0.05, stream_memory: {stream_memory},
  divide: {divide}}}
"""
PERPLEXITY = "perplexity: {{dataset: {home}/data.txt, sequence_length: 16, tokens: 64}}"
TEXT = PERPLEXITY + ", sample: {{new_tokens: 4, prompt: the cat}}"
SPEECH = "wer: {{dataset: {home}/data, new_tokens: 4, speed_tokens: 0}}"


def arguments(text: str | None, name: str, count: int, families: tuple[str, ...] = NAMES) -> argparse.ArgumentParser:
    """The arguments of a harness: `name` is what it does `count` times unless told otherwise."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(name, type=int, nargs="?", default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=families)
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES)
    return parser


def cases(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(family, schedule) of all that were asked for."""
    return [(family, schedule) for family in args.families for schedule in args.schedules]


def prepare(home: Path, family: str, schedule: str = "sequential", **changes: object) -> Path:
    """Write the model, its data and a recipe below `home`; the recipe's path. The run goes to `home/run`."""
    home.mkdir(parents=True, exist_ok=True)
    speech = family == "whisper"
    if speech:
        speech_models.save(home / "model")
        speech_models.folder(home / "data", 6)
    else:
        MODELS[family]().eval().save_pretrained(home / "model")
        tokenizer().save_pretrained(home / "model")
        words = ["the cat sat on a mat and ran .", "a mat sat on the cat and the mat ran ."]
        (home / "data.txt").write_text("\n".join(words[i % 2] for i in range(120)))
    settings = {
        "home": home,
        "schedule": schedule,
        "loss": "student" if schedule == "sequential" else "teacher+student",
        "suffix": "" if speech else ".txt",
        "stream_memory": 0.0 if schedule == "sequential" else "auto",  # in files: they outlive the process
        "divide": "null",
        "evaluate": (SPEECH if speech else TEXT).format(home=home),
        **changes,
    }
    (home / "recipe.yaml").write_text(RECIPE.format(**settings))
    return home / "recipe.yaml"
