"""Fine-tuning of fused experts: what the trainer stores comes back whole, and a stopped one ends the same."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
import transformers

import lillama
from lillama import LillamaError
from lillama.finetune import resume
from lillama.finetune.divided import learned_of
from lillama.recipe.schema import Recipe
from lillama.run import pipeline


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A recipe of a tiny Mixtral whose layers were distilled."""
    recipe = Recipe.load(families.prepare(tmp_path_factory.mktemp("home"), "mixtral", evaluate=""), ["quantize=null"])
    pipeline.compress(recipe.model_copy(update={"finetune": None}))
    return recipe


def test_every_parameter_that_learned_comes_back(compressed, tmp_path):
    model = lillama.load(f"{compressed.run.out}/model").requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resume.save_learned(learned_of(model), tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    resume.load_learned(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model.lm_head.requires_grad_(False)
    with pytest.raises(LillamaError, match="another model"):
        resume.load_learned(model, tmp_path)


@pytest.mark.slow
def test_a_stopped_finetuning_of_experts_ends_the_same(compressed, monkeypatch, tmp_path):
    pipeline.compress(compressed)
    whole = (Path(compressed.run.out) / "finetuned" / "model.safetensors").read_bytes()
    step = transformers.Trainer.training_step

    def stop(trainer, *arguments, **options):
        if trainer.state.global_step >= 4:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    again = compressed.model_copy(update={"run": compressed.run.model_copy(update={"out": str(tmp_path / "run")})})
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(again)
    result = pipeline.compress(again)
    assert (result.path / "model.safetensors").read_bytes() == whole
