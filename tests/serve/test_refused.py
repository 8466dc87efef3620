"""What cannot be served is refused before it serves, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import linears, save, tiny
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from lillama.checkpoint.quantizer import VERSION
from lillama.errors import LillamaError
from lillama.serving.source import Source


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["biases"].directory, tmp_path / "copy"))


def _without(directory: Path, name: str) -> None:
    """Take a tensor out of the file that has it, and of the index."""
    index = directory / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    file = directory / said["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    index.write_text(json.dumps(said))


def _config(directory: Path, change) -> None:
    file = directory / "config.json"
    said = json.loads(file.read_text())
    change(said["quantization_config"])
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.A",
        "model.layers.0.self_attn.k_proj.pivots",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.down_proj.bias",
        "model.norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name, copied, engine):
    _without(copied, name)
    with pytest.raises(LillamaError, match=name):
        engine(copied)


@pytest.mark.parametrize(
    "name, said",
    [
        ("model.layers.0.self_attn.q_proj.A", "B came, but A did not come"),
        ("model.layers.0.self_attn.k_proj.pivots", "B, C came, but pivots did not come"),
        ("model.layers.1.self_attn.v_proj.weight", "weights of 64 of 256 outputs did not come"),
    ],
)
def test_what_did_not_reach_a_layer_is_named_even_if_nobody_looked_before(name, said, copied, engine, monkeypatch):
    """As where the files of a hub's model were in no cache when the configuration was read."""
    monkeypatch.setattr(Source, "check", lambda *_, **__: None)
    monkeypatch.setattr("lillama.serving.loaded.Loaded._check_once", lambda _: None)
    _without(copied, name)
    with pytest.raises(LillamaError, match=said) as caught:
        engine(copied)
    assert "qkv_proj" in str(caught.value.where)


@pytest.mark.parametrize(
    "name, said",
    [
        ("model.layers.0.self_attn.q_proj.A_codes", "A_scale.* came, but A_codes did not come"),
        ("model.layers.0.mlp.up_proj.W_scale", "W_codes came, but W_scale did not come"),
        ("model.layers.1.self_attn.k_proj.pivots", "came, but pivots did not come"),
    ],
)
def test_codes_and_scales_are_asked_for_by_name(name, said, made, tmp_path, engine, monkeypatch):
    directory = Path(shutil.copytree(made["bits"].directory, tmp_path / "copy"))
    _without(directory, name)
    with pytest.raises(LillamaError, match=name):
        engine(directory)
    monkeypatch.setattr(Source, "check", lambda *_, **__: None)
    monkeypatch.setattr("lillama.serving.loaded.Loaded._check_once", lambda _: None)
    with pytest.raises(LillamaError, match=said):
        engine(directory)


def test_matrices_are_counted(copied, engine, monkeypatch):
    monkeypatch.setattr(Source, "check", lambda *_, **__: None)
    extra = {"kind": "linear", "storage": "factors", "rank": 8}
    _config(copied, lambda said: said["modules"].update({"model.layers.7.self_attn.o_proj": extra}))
    with pytest.raises(LillamaError, match=r"12 compressed matrices reached a layer, of 13"):
        engine(copied)


def test_an_unknown_storage_is_named(copied, engine):
    name = "model.layers.0.self_attn.q_proj"
    _config(copied, lambda said: said["modules"][name].update(storage="spectral"))
    with pytest.raises(
        LillamaError, match=r"'spectral' cannot be served: factors, pivoted can, in full or few bits"
    ) as caught:
        engine(copied)
    assert name in str(caught.value.where)


def test_bits_and_groups_that_are_none_are_named(copied, engine):
    name = "model.layers.0.self_attn.q_proj"
    _config(copied, lambda said: said["modules"][name].update(storage="factors:3:32"))
    with pytest.raises(LillamaError, match=r"'3:32' are no bits and group size that it knows") as caught:
        engine(copied)
    assert name in str(caught.value.where)


def test_a_newer_format_is_refused(copied, engine):
    _config(copied, lambda said: said.update(version=VERSION + 1))
    with pytest.raises(LillamaError, match=f"format version {VERSION + 1}, this lillama reads up to {VERSION}"):
        engine(copied)


def test_pivots_that_name_a_row_twice_are_refused(copied, engine):
    name = "model.layers.0.self_attn.k_proj.pivots"
    index = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(copied / index[name])
    tensors[name][1] = tensors[name][0]
    save_file(tensors, copied / index[name], {"format": "pt"})
    with pytest.raises(LillamaError, match="the pivots are not 24 different rows of 64"):
        engine(copied)


def test_a_file_that_was_cut_short_is_named(copied, engine):
    from lillama.checkpoint.seal import seal

    seal(copied)
    file = sorted(copied.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LillamaError, match=file.name):
        engine(copied)


def test_an_embedding_that_vllm_keeps_dense_is_refused_with_what_helps(tmp_path, engine):
    model = tiny("mixtral")
    save(model, {"model.embed_tokens": {"kind": "embedding", "storage": "factors", "rank": 40}}, tmp_path)
    with pytest.raises(LillamaError, match=r"(?s)embed_tokens: it is compressed.*--model-impl transformers"):
        engine(tmp_path)


def test_state_space_models_need_a_gpu(tmp_path, engine):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=8)).eval()
    save(model, linears(model, {"in_proj": ("factors", 24), "out_proj": ("pivoted", 24)}), tmp_path)
    with pytest.raises(LillamaError, match="state-space models for GPUs alone"):
        engine(tmp_path)
