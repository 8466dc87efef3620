"""What authors of plugins use: the checks of the contract say what is wrong, and a traced model begins a plugin."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
from conftest import tiny
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers import MixtralForCausalLM as Mixtral

from lillama import Layer, Weight, host, registry
from lillama.base.progress import Progress
from lillama.checkpoint.open import open_model
from lillama.cli import check, pluginfile, trace
from lillama.cli import main as cli
from lillama.errors import LillamaError
from lillama.run import prepare
from lillama.testing import batches, check_streams, contract, example_batches, recipe_for, token_batches
from lillama.testing.recipes import default_recipe
from lillama.testing.streams import StreamsDifferError

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def knowing(monkeypatch):
    """Plugins given by their files are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    yield
    host.get.cache_clear()
    registry.discover_again()


def call(*arguments):
    return cli.main([str(a) for a in arguments])


def test_every_two_choices_meet():
    factors = (["a", "b"], ["1", "2", "3"], ["x", "y", "z", "w"])
    chosen = contract.pairwise(*factors)
    assert len(chosen) < 24 and len(set(chosen)) == len(chosen)
    for first, second in itertools.combinations(range(3), 2):
        met = {(one[first], one[second]) for one in chosen}
        assert met == set(itertools.product(factors[first], factors[second]))


def test_a_layer_that_was_left_out_is_found_where_the_next_one_differs(model_dir, tmp_path):
    prepared = prepare.prepare(recipe_for(model_dir, tmp_path, "inkuba"))
    prepared.source.fetch(tmp_path)
    model, batch = open_model(model_dir, prepared.source.working), token_batches(tiny())[0]
    check_streams(prepared, model, batch)
    norm = model.model.norm.weight
    norm.data.mul_(3)  # a norm of ones before the head is hard to miss
    with pytest.raises(StreamsDifferError, match=r"^model\.norm, driven by itself.* by [\d.]+ at most"):
        check_streams(prepared, model, batch)
    norm.data.div_(3)
    prepared.layers = [layer for layer in prepared.layers if layer.name != "model.norm"]
    with pytest.raises((StreamsDifferError, LillamaError), match=r"^lm_head"):
        check_streams(prepared, model, batch)


def test_the_default_recipe_is_the_schemas_defaults_alone(model_dir, tmp_path):
    found = default_recipe(model_dir, tmp_path, "decoder").recipe
    from lillama.recipe.schema import Recipe

    bare = Recipe.parse(
        {
            "model": {"id": str(model_dir)},
            "plugin": "decoder",
            "compress": {"reduction": found.compress.reduction},
            "calibration": {"dataset": "given"},
            "run": {"out": str(tmp_path)},
        }
    )
    assert found == bare
    assert (found.compress.strategy, found.compress.init, found.compress.storage) == ("fisher", "fisher", "pivoted")
    assert found.distill.schedule == "sequential"


def test_an_encoder_decoder_gets_ids_for_both_halves():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    found = example_batches(model)
    assert all(set(batch) == {"input_ids", "decoder_input_ids"} for batch in found)
    assert model(**found[0]).logits.shape[-1] == 50


# The command.

BROKEN = """
from lillama import Layer, hookimpl

@hookimpl
def enumerate_layers(model):
    {body}
"""


def written(tmp_path, name, body):
    file = tmp_path / f"{name}.py"
    file.write_text(BROKEN.format(body=body))
    return file


def test_a_plugin_that_fails_is_told_what_fails_and_what_to_do(knowing, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contract, "CHECKS", contract.CHECKS[:2])
    layers = "[Layer.of_embedding(model), Layer('model.layers.0'), Layer.of_head(model)]"
    assert call("plugins", "check", written(tmp_path, "leaves_out", f"return {layers}"), "--model", model_dir) == 1
    said = capsys.readouterr().out
    assert re.search(r"layers and weights 1/1 · [0-9.]+ GiB · took", said)
    assert "FAILED exact streams: lm_head" in said
    assert "list it as a layer without weights" in " ".join(said.split())
    assert said.splitlines()[-1] == "leaves_out: 1 of 2 checks failed on LlamaForCausalLM"


@pytest.mark.parametrize("body", ["1 / 0", "return [Layer('model.layers.0')]", "return ['model.layers.0']"])
def test_a_plugin_that_raises_or_offers_nothing_fails(knowing, model_dir, tmp_path, capsys, body):
    name = f"broken_{len(body)}"
    assert call("plugins", "check", written(tmp_path, name, body), "--model", model_dir) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILED layers and weights: ") and f"the plugin {name} (" in said


def test_a_mistake_of_the_users_is_no_failure_of_the_plugin(model_dir, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert call("plugins", "check", *arguments) == 2
        return capsys.readouterr().err

    assert "Did you mean 'decoder'?" in refused("decodr", "--model", model_dir)
    assert "there is no such file" in refused(tmp_path / "nothing.py", "--model", model_dir)
    assert "no name in Python" in refused(written(tmp_path, "my-plugin", "return None"), "--model", model_dir)
    assert "it has no config.json" in refused("decoder", "--model", tmp_path)
    assert "no plugin knows LlamaForCausalLM" in refused("mamba", "--model", model_dir)
    assert "reads no data of its own" in refused("decoder", "--model", model_dir, "--data", "x.txt")
    monkeypatch.setattr(check, "LARGE", 1000)
    said = refused("decoder", "--model", model_dir)
    assert "parameters: checks would take long" in said and "from_config" in said and "--large" in said


def test_a_large_model_is_checked_where_that_is_asked_for(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(check, "LARGE", 1000)
    monkeypatch.setattr(contract, "CHECKS", contract.CHECKS[:1])
    assert call("plugins", "check", "decoder", "--model", model_dir, "--large") == 0
    assert "decoder: all 1 checks passed on LlamaForCausalLM" in capsys.readouterr().out


def test_a_stream_that_needs_data_is_given_it_or_says_so(knowing, model_dir, tmp_path, capsys, monkeypatch):
    body = """return [Layer.of_linears(model, f"model.layers.{i}", (("mlp.up_proj",),)) for i in range(3)]

@hookimpl
def calibration_stream(model, recipe):
    import json, pathlib, torch
    ids = json.loads(pathlib.Path(recipe.calibration.dataset).read_text())
    return [{"input_ids": torch.tensor(ids)}] * 9
"""
    file = written(tmp_path, "own_stream", body)
    known = check.make_known(str(file))
    (tmp_path / "ids.json").write_text("[[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]")

    def found(data):
        return batches.batches_for(check._opened(check.Wanted(known, model_dir, data)), data)

    assert [batch["input_ids"].tolist()[0] for batch in found(str(tmp_path / "ids.json"))] == [[1, 2, 3, 4, 5, 6]] * 3
    assert found(None)[0]["input_ids"].shape == (2, 12)  # random ids do as well
    monkeypatch.setattr(type(tiny()), "main_input_name", "input_features")
    assert call("plugins", "check", known, "--model", model_dir) == 2
    assert "makes its own batches, and has none to make them of" in capsys.readouterr().err


# Tracing.


def mixtral():
    config = MixtralConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    model = Mixtral(config)
    names = [f"model.layers.{i}" for i in range(2)]
    return model, [Layer(n, (*linears(model, n, QKV), *Layer.of_experts(model, f"{n}.mlp.experts"))) for n in names]


def deepseek():
    """The first block dense, the others experts between linears."""
    config = DeepseekV3Config(
        **SIZES, num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    attention = (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), ("self_attn.q_b_proj",))
    dense = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    shared = (("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), ("mlp.shared_experts.down_proj",))
    layers = [Layer.of_linears(model, "model.layers.0", (*attention, *dense))]
    for name in ("model.layers.1", "model.layers.2"):
        stacked = Layer.of_experts(model, f"{name}.mlp.experts")
        layers.append(Layer(name, (*linears(model, name, *attention), *stacked, *linears(model, name, *shared))))
    return model, layers


def linears(model, name, *groups):
    return Layer.of_linears(model, name, groups).weights


def unlike():
    """Blocks of which one groups its linears otherwise, though all have the same."""
    model = tiny()
    whole, split = (QKV,), (QKV[:1], QKV[1:])
    return model, [Layer.of_linears(model, f"model.layers.{i}", (whole, split, whole)[i]) for i in range(3)]


def t5():
    """Two lists of blocks, and what stands between them."""
    from transformers import T5Config, T5ForConditionalGeneration

    from lillama.pretrained.trace import trace

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    layers = trace(model)
    assert {layer.name.partition(".")[0] for layer in layers} == {"encoder", "decoder"}
    return model, layers


def built_in(plugin, name="llama"):
    model = tiny(name)
    return model, host.get().layers(model, None, plugin)[1]


def odd_ends():
    """Layers beside the blocks that are neither embedding nor head, and blocks in part."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3))
    head = Weight("lm_head", (64, 32))
    blocks = [Layer.of_linears(model, f"model.layers.{i}", (QKV,)) for i in (1, 2)]
    return model, [
        Layer("model.embed_tokens", kind="embedding"),
        Layer("model.layers.0"),
        *blocks,
        Layer("model.norm"),
        Layer("lm_head", (head,)),
    ]


CASES = {
    "decoder": lambda: built_in("decoder"),
    "phi": lambda: built_in("decoder", "phi"),
    "embeddings": lambda: built_in("inkuba"),
    "untied": lambda: built_in("inkuba", "llama-bias"),
    "mixtral": mixtral,
    "deepseek": deepseek,
    "unlike": unlike,
    "odd": odd_ends,
    "t5": t5,
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_lists_what_was_traced(case):
    model, layers = CASES[case]()
    text = pluginfile.plugin_file(model, layers, "AutoModelForSeq2SeqLM" if case == "t5" else "AutoModelForCausalLM")
    code = [line for line in text.splitlines() if line and not line.startswith(('"""', "NEURONS"))]
    assert len(code) <= 20, text  # and a line for the MLPs of each list of blocks
    scope = {}
    exec(text, scope)
    found = scope["enumerate_layers"](model)
    assert [layer.name for layer in found] == [layer.name for layer in layers]
    weights = [{(w.name, w.shape, w.copies, w.kind, w.tied) for w in layer.weights} for layer in layers]
    assert [{(w.name, w.shape, w.copies, w.kind, w.tied) for w in layer.weights} for layer in found] == weights
    model.config.model_type = "another"
    assert scope["enumerate_layers"](model) is None


def test_a_rule_that_cannot_be_stated_is_not_guessed_at(monkeypatch):
    model, layers = built_in("decoder")
    monkeypatch.setattr(pluginfile.Writer, "stack", lambda self, name, blocks: '*(Layer(f"x.{i}") for i in range(2))')
    with pytest.raises(LillamaError, match="follow no rule that a short plugin can state"):
        pluginfile.plugin_file(model, layers)


def test_the_summary_keeps_blocks_apart_that_differ():
    said = trace.summary(deepseek()[1]).splitlines()
    assert said[0].startswith("3 layers")
    assert "model.layers.0 (1 block)" in said and "model.layers.1-2 (2 blocks)" in said
    assert "  model.layers.1.mlp.experts.gate [4 x 16 x 32] + model.layers.1.mlp.experts.up [4 x 16 x 32]" in said
    assert "model.layers.0-2 (3 blocks, passed through)" in trace.summary(built_in("inkuba")[1])


def test_the_hook_for_another_auto_class_is_written_where_it_is_needed():
    model, layers = built_in("decoder")
    scope = {}
    exec(pluginfile.plugin_file(model, layers, "AutoModelForSeq2SeqLM"), scope)
    assert scope["auto_class"](model.config).__name__ == "AutoModelForSeq2SeqLM"
    model.config.model_type = "another"
    assert scope["auto_class"](model.config) is None


@pytest.mark.slow
def test_a_traced_plugin_passes_the_check(model_dir, tmp_path, capsys):
    assert call("plugins", "trace", model_dir) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 layers") and "def enumerate_layers(model):" in said
    file = tmp_path / "lillama_mine.py"
    assert call("plugins", "trace", model_dir, "--out", file) == 0
    assert file.read_text() in said
    assert call("plugins", "trace", model_dir, "--out", file) == 2
    command = [sys.executable, "-m", "lillama", "plugins", "check", str(file), "--model", str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" 1/1")[0] for line in done.stdout.splitlines()[:2]] == ["layers and weights", "exact streams"]
    assert done.stdout.endswith(f"lillama_mine: all {len(contract.CHECKS)} checks passed on LlamaForCausalLM\n")


def test_a_check_that_fails_ends_the_contract_of_a_test(tmp_path):
    with pytest.raises(LillamaError, match="no plugin knows LlamaForCausalLM"):
        contract.check_architecture(tiny(), tmp_path, plugin="mamba")
    assert Progress().seconds == {}
