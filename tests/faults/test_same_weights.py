"""The same seed on the same machine gives the same bytes, twice, in every schedule and with fine-tuning."""

from __future__ import annotations

import hashlib
import shutil

import families
import pytest
import torch

from lillama.recipe.schema import Recipe
from lillama.run import pipeline


def weights(out):
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*/*.safetensors"))
    }


@pytest.mark.parametrize(("schedule", "lora"), [("sequential", True), ("concurrent", False)])
@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(schedule, lora, tmp_path):
    if lora:
        pytest.importorskip("peft")
    path = families.prepare(tmp_path, "llama", schedule, evaluate="")
    recipe = Recipe.load(path, ["finetune.lora={rank: 2}"] if lora else [])
    found = []
    for draw in (1, 2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        torch.manual_seed(draw)  # what a process drew before must not matter
        torch.rand(draw)
        pipeline.compress(recipe)
        found.append(weights(tmp_path / "run"))
    assert found[0] == found[1] and {"model", "finetuned", "quantized"} <= found[0].keys()
