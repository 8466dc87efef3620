"""InkubaLM: one MLP shared by all blocks, code in its repository that must not run, embedding and head in factors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import SMALL, tiny, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lillama import Recipe, make_plan
from lillama.base.progress import Progress
from lillama.checkpoint import export
from lillama.checkpoint.load import load
from lillama.errors import LillamaError
from lillama.run import pipeline, prepare
from lillama.testing import check_architecture, one_and_the_same, recipe_for, token_batches

# The published shape (DESIGN 9; table 18: 421.9 M -> 299 M).
PUBLISHED = {
    "model_type": "llama",
    "architectures": ["VulavulaLlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "vulavulaslm.VulavulaLlamaForCausalLM"},
    "vocab_size": 61788,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
OWN_CODE = {"AutoConfig": "vulavulaslm.Config", "AutoModelForCausalLM": "vulavulaslm.Model"}
MLPS = [f"model.layers.{i}.mlp" for i in range(SMALL["num_hidden_layers"])]


def inkuba(**changes) -> LlamaForCausalLM:
    """A tiny one: equal MLPs, the configuration of its repository."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, tie_word_embeddings=False, auto_map=PUBLISHED["auto_map"], **changes)
    model = LlamaForCausalLM(config).float().eval()
    for layer in model.model.layers[1:]:
        layer.mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    return model


@pytest.fixture
def saved(tmp_path):
    """Its directory, with a file of code that raises when it is run."""
    path = tmp_path / "InkubaLM"
    inkuba().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "vulavula", "architectures": ["VulavulaLlamaForCausalLM"], "auto_map": OWN_CODE}
    (path / "config.json").write_text(json.dumps(config))
    (path / "vulavulaslm.py").write_text("raise AssertionError('the code of the repository was run')\n")
    tokenizer().save_pretrained(path)
    return path


def run(path, out, changes=None, **settings):
    changes = {"compress.init": "svd", **(changes or {})}
    recipe = recipe_for(path, out, "auto", changes)
    prepared = prepare.prepare(recipe)
    batches = token_batches(prepared.source.model)
    return pipeline.Run(prepared, Progress(), batches=batches, **settings).execute()


def test_the_plan_of_the_published_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    recipe = Recipe.load("recipes/inkubalm_hausa30.yaml", [f"model.id={tmp_path}"])
    plan = make_plan(recipe)
    assert plan.before == 421_939_200
    assert plan.after == 299_591_680
    assert plan.ranks == {"model.embed_tokens": 1024, "lm_head": 1024}


def test_contract(tmp_path):
    check_architecture(inkuba(), tmp_path)


def test_what_is_shared_is_counted_saved_and_kept_once(saved, tmp_path):
    result = run(saved, tmp_path / "run", {"model.trust_remote_code": True})
    unshared = sum(p.numel() for p in inkuba().parameters())
    mlp = sum(p.numel() for p in inkuba().model.layers[0].mlp.parameters())
    assert result.plan.before == unshared - (len(MLPS) - 1) * mlp
    held = [name for name in load_file(result.path / "model.safetensors") if ".mlp." in name]
    assert held and all(name.startswith(MLPS[0]) for name in held)
    for path in (result.path, tmp_path / "again"):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert len({id(model.get_submodule(name)) for name in MLPS}) == 1
        assert sum(p.numel() for p in model.parameters()) == result.plan.after
        model.save_pretrained(tmp_path / "again")
    assert not list(result.path.glob("*.py"))
    assert "auto_map" not in json.loads((result.path / "config.json").read_text())


def test_the_original_is_evaluated_without_its_code(saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and ran\n" * 40)
    evaluate = {"perplexity": {"dataset": str(text), "split": "train", "sequence_length": 16}}
    recipe = recipe_for(saved, tmp_path / "run").model_dump(mode="json") | {"evaluate": evaluate}
    recipe["model"]["trust_remote_code"] = True
    recipe["compress"] |= {"reduction": 0.3, "rank_multiple": 1}
    prepared = prepare.prepare(Recipe.parse(recipe))
    batches = token_batches(prepared.source.model)
    result = pipeline.Run(prepared, Progress(), batches=batches).execute()
    own = inkuba()
    ids = torch.tensor([tokenizer()("the cat sat on a mat and ran " * 40)["input_ids"]])[:, :16]
    expected = torch.nn.functional.cross_entropy(own(ids).logits[0, :-1].float(), ids[0, 1:]).exp()
    assert result.metrics["before"]["perplexity/perplexity"] == pytest.approx(expected.item(), rel=0.05)
    assert result.metrics["after"]["perplexity/perplexity"] > 1


@pytest.mark.slow
def test_a_shared_file_needs_no_copies(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    once = {k: v for k, v in state.items() if ".mlp." not in k or k.startswith(MLPS[0])}
    other = tmp_path / "InkubaLM-once"
    shutil.copytree(saved, other)
    save_file(once, other / "model.safetensors", {"format": "pt"})
    a, b = run(saved, tmp_path / "a"), run(other, tmp_path / "b")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load(a.path)(ids).logits, load(b.path)(ids).logits)


def test_copies_that_differ_are_refused(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 4] += 1e-6
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(LillamaError, match=r"layers\.2\.mlp\.up_proj\.weight.*are different"):
        run(saved, tmp_path / "run")


def test_auto_leaves_other_models_to_their_plugin(tmp_path):
    for name in ("llama", "mistral"):
        tiny(name).save_pretrained(tmp_path / name)
        assert prepare.prepare(recipe_for(tmp_path / name, tmp_path / "run")).plugin.name == "decoder"
    inkuba().save_pretrained(tmp_path / "inkuba")
    assert prepare.prepare(recipe_for(tmp_path / "inkuba", tmp_path / "run")).plugin.name == "inkuba"


def test_dense_again_loads_without_us(saved, tmp_path):
    result = run(saved, tmp_path / "run")
    export.export_dense(result.path, tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    assert {f"{name}.up_proj.weight" for name in MLPS} <= state.keys()
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = load(result.path).eval()(ids).logits
        assert torch.allclose(dense.eval()(ids).logits, expected, atol=1e-5)


def test_a_weight_of_a_shared_module_cannot_be_factorised(saved, tmp_path):
    import lillama_decoder

    source = prepare.prepare(recipe_for(saved, tmp_path / "run")).source
    layers = lillama_decoder.enumerate_layers(source.model)
    assert len(one_and_the_same(source.model)) == 3
    with pytest.raises(LillamaError, match="shared modules"):
        prepare._check_layers(layers, source)
