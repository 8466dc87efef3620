"""The contract every architecture plugin passes; call it in your plugin's own tests.

def test_contract(tmp_path):
    check_architecture(MyModel(MyConfig(hidden_size=32, ...)), tmp_path)
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama import registry
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.contract import Layer
from lillama.lowrank.counts import largest_rank, stored
from lillama.plan.plan import Plan
from lillama.pretrained.calls import arguments
from lillama.recipe.schema import Recipe
from lillama.run import pipeline, prepare

Batches = list[dict[str, Tensor]]

_FRESH = """
import sys
import lillama, torch, transformers
from safetensors.torch import load_file, save_file
directory, inputs, outputs, name = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(directory, dtype="float32").eval()
parameters = torch.tensor(sum(p.numel() for p in model.parameters()))
save_file({"logits": model(**load_file(inputs)).logits.detach().contiguous(), "parameters": parameters}, outputs)
"""


def token_batches(model: Any, *, batches: int = 3, batch_size: int = 2, length: int = 12) -> Batches:
    """Random token ids for `model`, seeded."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [
        {"input_ids": torch.randint(0, vocabulary, (batch_size, length), generator=generator)} for _ in range(batches)
    ]


def check_architecture(
    model: Any,
    directory: Path,
    batches: Batches | None = None,
    plugin: str = "auto",
    storages: Sequence[str] | None = None,
) -> None:
    """Assert that a plugin serves `model`, a tiny randomly initialised one in float32, as the contract demands.

    - full rank reproduces the logits to 1e-5;
    - planned parameters equal the actual ones exactly;
    - a saved checkpoint loads bit-equal in a fresh process, and once more after `save_pretrained`, with what is tied
      or shared still so;
    - every loss, schedule and storage runs.

    `batches` are the model's forward arguments (default: random token ids). `directory` must be empty or new.
    `storages` are the formats to try (default: all that are registered, plugins' ones too).
    """
    model = model.float().eval()
    original = directory / "model"
    model.save_pretrained(original)
    batches = batches or token_batches(model)
    inputs = arguments(batches[0])
    _check_weights(original, plugin)
    storages = list(registry.STORAGES) if storages is None else list(storages)
    with torch.no_grad():
        expected = model(**inputs).logits
    for storage in storages:
        _full_rank(original, directory / f"full-{storage}", storage, batches, inputs, expected, plugin)
    choices = itertools.product(("concurrent", "sequential"), registry.LOSSES, storages)
    for number, (schedule, loss, storage) in enumerate(choices):
        changes = {"distill.schedule": schedule, "distill.loss": loss, "compress.storage": storage}
        result = _run(original, directory / f"run-{number}", batches, plugin, changes)
        loaded = load(result.path)
        actual = sum(p.numel() for p in loaded.parameters())
        assert actual == result.plan.after, f"{changes}: planned {result.plan.after} parameters, got {actual}"
    _same_in_a_fresh_process(result.path, inputs, directory)
    loaded.save_pretrained(directory / "again")
    first, second = load(result.path).eval(), load(directory / "again").eval()
    with torch.no_grad():
        once, twice = first(**inputs).logits, second(**inputs).logits
    assert torch.equal(once, twice), "saving the loaded model changed it"
    assert one_and_the_same(first) == one_and_the_same(second), "saving the loaded model changed what it shares"
    assert sum(p.numel() for p in second.parameters()) == result.plan.after, "it is no longer as small"
    first.tie_weights()  # evaluators do so
    with torch.no_grad():
        assert torch.equal(once, first(**inputs).logits), "config.tie_word_embeddings is not what the model is"


def one_and_the_same(model: Any) -> set[frozenset[str]]:
    """The groups of names that are one parameter in `model`: tied weights, shared modules."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def recipe_for(model: Path, out: Path, plugin: str = "auto", changes: dict[str, Any] | None = None) -> Recipe:
    """A small recipe for a local model; `changes` maps dotted keys to values."""
    settings: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "plugin": plugin,
        "compress": {
            "reduction": 0.1,
            "of": "weights",
            "rank_multiple": 2,
            "strategy": "uniform",
            "init": "whitened",
            "storage": "factors",
        },
        "distill": {
            "loss": "teacher+student",
            "objective": "l1_logcos",
            "train": "factors",
            "batch_size": 2,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "warmup": 0.0,
            "clip_norm": None,
            "holdout": 0.3,
        },
        "calibration": {"dataset": "given"},
        "run": {"out": str(out), "device": "cpu", "compute": "float32"},
    }
    settings = copy.deepcopy(settings)
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    return Recipe.parse(settings)


def full_rank_plan(layers: list[Layer], before: int, storage: str) -> Plan:
    """Every weight at the largest rank its storage can hold it exactly."""
    ranks = {w.name: min(w.shape) for layer in layers for w in layer.weights}
    return Plan(tuple(layers), ranks, storage, before)


def _check_weights(original: Path, plugin: str) -> None:
    """The plugin offers weights that can become smaller, and all are inside their layers."""
    prepared = prepare.prepare(recipe_for(original, original, plugin))
    smallest = [w for layer in prepared.layers for w in layer.weights if largest_rank(w, w.parameters, "factors", 1)]
    assert smallest, "the plugin offers no weight that factors could make smaller"
    for layer in prepared.layers:
        prepared.source.model.get_submodule(layer.name)
        for weight in layer.weights:
            assert weight.name.startswith(layer.name), f"{weight.name} is not inside {layer.name}"
            assert weight.tied or stored(weight, 1, "factors") > 0


def _run(
    original: Path, out: Path, batches: Batches, plugin: str, changes: dict[str, Any], plan: Plan | None = None
) -> pipeline.Result:
    prepared = prepare.prepare(recipe_for(original, out, plugin, changes))
    if plan is not None:
        prepared = replace(prepared, plan=plan)
    return pipeline.Run(prepared, Progress(), batches=batches).execute()


def _full_rank(
    original: Path, out: Path, storage: str, batches: Batches, inputs: Any, expected: Tensor, plugin: str
) -> None:
    prepared = prepare.prepare(recipe_for(original, out, plugin))
    plan = full_rank_plan(prepared.layers, prepared.source.parameters, storage)
    changes = {"compress.init": "svd", "compress.storage": storage, "distill.epochs": 0}
    result = _run(original, out, batches, plugin, changes, plan)
    with torch.no_grad():
        logits = load(result.path).eval()(**inputs).logits
    worst = float((logits - expected).abs().max())
    assert worst <= 1e-5, f"full rank in {storage} storage changes the logits by {worst:.2g}"


def _same_in_a_fresh_process(path: Path, inputs: dict[str, Tensor], directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    loaded = load(path).eval()
    save_file(inputs, directory / "inputs.safetensors")
    out = directory / "outputs.safetensors"
    with torch.no_grad():
        here = loaded(**inputs).logits
    arguments = [str(path), str(directory / "inputs.safetensors"), str(out), type(loaded).__name__]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True, capture_output=True, text=True)
    found = load_file(out)
    assert torch.equal(here, found["logits"]), "a fresh process computes other logits"
    parameters = sum(p.numel() for p in loaded.parameters())
    assert parameters == int(found["parameters"]), "a fresh process does not share what is shared"
