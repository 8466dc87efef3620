"""Starting factors that make up for what was lost before them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

from lillama.checkpoint.load import load
from lillama.errors import LillamaError
from lillama.run import pipeline
from lillama.testing import recipe_for, token_batches


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    return path


def outputs_error(original, out, init, padded=False):
    """How far the final hidden states are off after initialisation alone, on the calibration batches."""
    batches = token_batches(tiny(), batches=8)
    if padded:
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -3:] = 0
    changes = {
        "compress.init": init,
        "compress.reduction": 0.4,
        "distill.schedule": "sequential",
        "distill.loss": "student",
        "distill.epochs": 0,
        "distill.holdout": 0,
        "run.compute": "float32",
    }
    result = pipeline.compress(recipe_for(original, out, changes=changes), batches=batches)
    model, teacher = load(result.path), tiny()
    with torch.no_grad():
        return sum(
            float((model.model(**batch)[0] - teacher.model(**batch)[0]).square()[_counts(batch)].sum())
            for batch in batches
        )


def _counts(batch):
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


@pytest.mark.parametrize("padded", [False, True])
def test_a_whole_model_is_nearer_to_its_original_than_with_whitened(original, tmp_path, padded):
    ours = outputs_error(original, tmp_path / "a", "compensated", padded)
    assert ours < outputs_error(original, tmp_path / "b", "whitened", padded)


def test_the_concurrent_schedule_is_refused_before_anything_is_written(original, tmp_path):
    changes = {"compress.init": "compensated", "distill.schedule": "concurrent"}
    with pytest.raises(LillamaError, match="only the sequential schedule has"):
        pipeline.compress(recipe_for(original, tmp_path / "out", changes=changes), batches=token_batches(tiny()))
    assert not (tmp_path / "out").exists()
