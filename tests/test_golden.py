"""Checkpoints and run directories of earlier versions (tests/golden) still load, compute the same, and go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lillama
from lillama import LillamaError
from lillama.testing import recipe_for, token_batches

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))


def expected(name):
    """(the model's arguments, its logits) as the version that made the checkpoint computed them."""
    held = load_file(GOLDEN / name / "expected.safetensors")
    return held, held.pop("logits")


def test_there_is_a_checkpoint_of_every_kind_and_storage():
    kinds = set()
    for name in CASES:
        said = json.loads((GOLDEN / name / "model" / "config.json").read_text())["quantization_config"]
        kinds |= {(how["kind"], how["storage"]) for how in said["modules"].values()}
    assert kinds >= {(k, s) for k in ("linear", "embedding", "experts") for s in ("factors", "pivoted")}
    assert {kind for kind, storage in kinds if ":4:" in storage} == {"linear", "embedding", "experts"}
    assert ("linear", "factors:8:32") in kinds and ("linear", "dense:8:32") in kinds


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_of_earlier_versions_load_and_compute_the_same(name, tmp_path):
    inputs, logits = expected(name)
    model = lillama.load(GOLDEN / name / "model").eval()
    with torch.no_grad():
        # Not bit-equal: it was computed on another machine.
        torch.testing.assert_close(model(**inputs).logits.float(), logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    old, new = model.state_dict(), lillama.load(tmp_path / "again").state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old), "saving it again changes its tensors"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A run directory of an earlier version beside the model it compressed, as if torch had not been updated since."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    (tmp_path / "run" / "original-model").rename(tmp_path / "original-model")
    manifest = json.loads((tmp_path / "run" / "MANIFEST.json").read_text())
    manifest["fingerprint"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    _, modified = manifest["fingerprint"]["model"]["model.safetensors"]
    os.utime(tmp_path / "original-model" / "model.safetensors", (modified, modified))
    (tmp_path / "run" / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    changes = {"compress.reduction": 0.2, "distill.schedule": "sequential", "compress.storage": "pivoted"}
    changes |= {"distill.train": "layer"}
    return manifest, recipe_for(Path("original-model"), Path("run"), "decoder", changes)


def batches():
    return token_batches(transformers.AutoModelForCausalLM.from_pretrained("original-model"), length=8)


def test_a_finished_run_of_an_earlier_version_is_known_as_finished(old_run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    lillama.compress(old_run[1], batches=batches())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == before


def test_a_stopped_run_of_an_earlier_version_goes_on(old_run, tmp_path):
    manifest, recipe = old_run
    first, second = sorted(name for name in manifest["files"] if name.startswith("layers/"))
    for name in [second, "metrics.json", *(name for name in manifest["files"] if name.startswith("model/"))]:
        del manifest["files"][name]
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "MANIFEST.json").write_text(json.dumps(manifest))
    kept = (tmp_path / "run" / first).stat().st_mtime_ns
    model = lillama.load(lillama.compress(recipe, batches=batches()).path).eval()
    assert (tmp_path / "run" / first).stat().st_mtime_ns == kept, "a finished layer was distilled again"
    inputs, logits = expected("run")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.float(), logits, rtol=1e-3, atol=1e-4)


def test_a_run_of_an_earlier_version_is_another_one_where_a_key_asks_for_what_it_could_not(old_run):
    asked = old_run[1].compress.model_copy(update={"keep_dense_below": 0.15})
    with pytest.raises(LillamaError, match="keep_dense_below"):
        lillama.compress(old_run[1].model_copy(update={"compress": asked}), batches=batches())
