"""The checkpoint behaves as any transformers checkpoint, and fails loudly where it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import lillama
from lillama import LillamaError, registry
from lillama.base.tensorfile import Entry
from lillama.checkpoint import export, write
from lillama.cli import main as cli
from lillama.lowrank import swap as factors
from lillama.plan.plan import Plan
from lillama.run.pipeline import compress
from lillama.testing import recipe_for, token_batches


@pytest.fixture(scope="module", params=["factors", "pivoted"])
def compressed(request, tmp_path_factory):
    """(checkpoint directory, original directory) of a tiny tied Llama."""
    path = tmp_path_factory.mktemp(request.param)
    tiny().save_pretrained(path / "original")
    tokenizer().save_pretrained(path / "original")
    recipe = recipe_for(path / "original", path / "run", changes={"compress.storage": request.param})
    return compress(recipe, batches=token_batches(tiny())).path, path / "original"


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batches(tiny())[0]).logits


def test_transformers_loads_what_lillama_loads(compressed):
    path, _ = compressed
    expected = logits(lillama.load(path))
    for options in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.float32}):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path, **options)), expected)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))).all()
    assert any(factors.is_factorised(m) for m in lillama.load(path).modules())


def test_sharded_checkpoints_load_bit_equal(compressed, tmp_path, monkeypatch):
    path, original = compressed
    model = lillama.load(path)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert torch.equal(logits(lillama.load(tmp_path / "hf")), logits(model))
    # And the shards the run itself writes.
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    storage = json.loads((path / "config.json").read_text())["quantization_config"]["modules"]
    recipe = recipe_for(
        original, tmp_path / "run", changes={"compress.storage": next(iter(storage.values()))["storage"]}
    )
    ours = compress(recipe, batches=token_batches(tiny())).path
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(lillama.load(ours)), logits(model))


def test_a_base_model_loads_from_the_whole_model_s_checkpoint(compressed):
    path, _ = compressed
    whole = lillama.load(path)
    base = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = base(**token_batches(tiny())[0]).last_hidden_state
        assert torch.equal(whole.lm_head(hidden), logits(whole))


def test_half_and_float_work(compressed):
    model = lillama.load(compressed[0])
    assert next(model.half().parameters()).dtype == torch.float16
    assert next(model.float().parameters()).dtype == torch.float32


def test_generate_and_pipeline(compressed):
    path, _ = compressed
    model = lillama.load(path)
    ids = torch.tensor([[1, 5, 6]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
    generate = pipeline("text-generation", model=str(path))
    text = generate("the cat sat", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("the cat sat")


def test_it_trains_and_saves_again(compressed, tmp_path):
    model = lillama.load(compressed[0]).train()
    ids = token_batches(tiny())[0]["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = logits(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lillama.load(tmp_path)), logits(model))


def test_tied_embeddings_stay_tied_and_are_stored_once(compressed):
    path, _ = compressed
    model = lillama.load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(path / "model.safetensors")


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
assert "lillama" not in sys.modules
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_lillama_it_fails_loudly(compressed):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(compressed[0])], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
assert "lillama" not in sys.modules
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


@pytest.mark.slow
def test_export_dense_loads_with_plain_transformers(compressed, tmp_path):
    path, original = compressed
    export.export_dense(path, tmp_path / "dense")
    save_file(token_batches(tiny())[0], tmp_path / "in")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits(lillama.load(path)), rtol=0, atol=1e-4)
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(LillamaError, match="not empty"):
        export.export_dense(path, tmp_path / "dense")
    with pytest.raises(LillamaError, match="holds no factors"):
        export.export_dense(original, tmp_path / "other")


def test_the_verb_exports_in_any_registered_form(compressed, tmp_path, monkeypatch, capsys):
    path, _ = compressed

    def names_only(directory, target):
        """Write the names of the tensors."""
        target.mkdir()
        (target / "names.txt").write_text("\n".join(load_file(directory / "model.safetensors")))

    monkeypatch.setattr(registry.EXPORTS, "_targets", dict(registry.EXPORTS._targets))
    registry.Registries.exports.add("names", names_only)
    assert cli.main(["export", str(path), str(tmp_path / "names"), "--as", "names"]) == 0
    assert "model.layers.1.mlp.up_proj.B" in (tmp_path / "names" / "names.txt").read_text()
    assert capsys.readouterr().out == f"wrote {tmp_path}/names\n"
    for given in (["--dense"], ["--as", "dense"]):
        assert cli.main(["export", str(path), str(tmp_path / given[-1]), *given]) == 0
        assert (tmp_path / given[-1] / "model.safetensors").exists()
    capsys.readouterr()
    assert cli.main(["export", str(path), str(tmp_path / "x"), "--as", "dens"]) == 2
    error = capsys.readouterr().err
    assert "no export is called 'dens'" in error and "Did you mean 'dense'?" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["org/model: the second", 'org/it\'s "quoted"', "org/plain", "- a #list", "yes"])
def test_the_card_says_what_the_model_was_made_of_whatever_its_name(name):
    from huggingface_hub import ModelCard

    from lillama.checkpoint.card import model_card

    recipe = recipe_for(name, "out")
    data = ModelCard(model_card(recipe, Plan((), {}, "factors", 100), "AutoModelForCausalLM")).data
    assert data.to_dict() == {"base_model": name, "library_name": "transformers", "tags": ["lillama", "low-rank"]}
    local = ModelCard(model_card(recipe_for("./here", "out"), Plan((), {}, "factors", 100), "AutoModelForCausalLM"))
    assert local.data.base_model is None and "# here, 0% smaller" in local.text


def test_a_tensor_larger_than_a_shard_has_one_of_its_own_and_the_index_names_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate((10, 10, 50, 10, 10, 10))}
    write._write_shards([Entry.of(*item) for item in tensors.items()], tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 400}
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (
        files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)] == sorted({*index["weight_map"].values()})
    )
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert list(load_file(tmp_path / index["weight_map"]["t2"])) == ["t2"]


@pytest.mark.parametrize("harm", ["missing", "unexpected", "shape"])
def test_load_refuses_a_damaged_checkpoint(compressed, tmp_path, harm):
    path = tmp_path / "copy"
    shutil.copytree(compressed[0], path)
    tensors = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
    name = "model.layers.1.mlp.up_proj.B"
    if harm == "missing":
        del tensors[name]
    elif harm == "unexpected":
        tensors["model.layers.9.extra"] = torch.ones(2)
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LillamaError):
        lillama.load(path)


def test_load_points_at_the_checkpoint_inside_a_run(compressed):
    with pytest.raises(LillamaError, match=r"Did you mean .*model"):
        lillama.load(compressed[0].parent)


def test_every_file_beside_the_weights_comes_along(compressed):
    path, _ = compressed
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= {
        p.name for p in path.iterdir()
    }
    assert "import lillama" in (path / "README.md").read_text()


def test_a_newer_format_is_refused(compressed, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(compressed[0], path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LillamaError, match="format version 99"):
        lillama.load(path)
