"""docs/plugins.md: every example of the page is a plugin that does what the page says."""

from __future__ import annotations

import json
import re
import sys
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny, tokenizer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    WhisperConfig,
)

import lillama
from lillama import host, registry
from lillama.cli import main as cli
from lillama.host import Host
from lillama.recipe.schema import Recipe
from lillama.testing import contract, token_batches

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "plugins.md").read_text()
# What stands in each file, by its name.
BLOCKS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL))
REGISTRIES = [name for name, value in vars(registry.Registries).items() if isinstance(value, registry.Registry)]


def module(name):
    found = types.ModuleType(name)
    sys.modules[name] = found  # what is pickled, copied or inspected looks there
    exec(compile(BLOCKS[name], f"docs/plugins.md:{name}", "exec"), found.__dict__)
    return found


@pytest.fixture
def guided(monkeypatch):
    """A process that has the page's plugins installed beside the built-in ones."""
    assert "decoder" in registry.PLUGINS, "found once, before anything is put in its place"
    for one in REGISTRIES:
        kept = getattr(registry.Registries, one)
        monkeypatch.setattr(kept, "_targets", dict(kept._targets))
    names = [name for name in BLOCKS if name.startswith("lillama_")]
    dist = SimpleNamespace(name="guide", version="1")
    points = [
        SimpleNamespace(name=name.removeprefix("lillama_"), dist=dist, load=lambda name=name: module(name))
        for name in names
    ]
    from importlib.metadata import entry_points

    there = Host([*entry_points(group=host.GROUP), *points])
    there.register()
    monkeypatch.setattr(host, "get", lambda: there)
    monkeypatch.setattr(registry.PLUGINS, "_found", there.plugins)
    yield there
    for name in names:
        sys.modules.pop(name, None)


def test_every_hook_and_every_registry_has_an_example_that_loads(guided):
    assert len(BLOCKS) == PAGE.count("```python")
    shown = {hook for plugin in guided.plugins.values() if plugin.distribution == "guide" for hook in plugin.hooks}
    assert shown == set(host.HOOKS)
    failed = {name: plugin.failure for name, plugin in guided.plugins.items() if plugin.failure}
    assert not failed
    for name in REGISTRIES:
        assert f"registries.{name}.add(" in PAGE, name
        assert f"| `{name}` |" in PAGE, name


def test_the_whole_plugin_and_its_package_belong_together(guided):
    package = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    (module_name,) = package["project"]["entry-points"][host.GROUP].values()
    assert package["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"{module_name}.py"]
    sizes = {"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    plugin, layers = guided.layers(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, **sizes)), None, "gpt_neox")
    assert plugin.name == module_name.removeprefix("lillama_")
    assert [len(layer.weights) for layer in layers] == [4, 4]


def test_kinds_of_weights_are_named_as_the_page_says(guided):
    model = tiny()
    layers = guided.layers(model, None, "embeddings")[1]
    assert [layer.kind for layer in layers] == ["embedding", *["block"] * 4, "head"]
    assert layers[-1].weights[0].tied == layers[0].weights[0].name == "model.embed_tokens"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes))
    (layer,) = guided.layers(mixtral, None, "experts")[1]
    experts = {w.name.rpartition(".")[2]: (w.copies, *w.shape) for w in layer.weights if w.kind == "experts"}
    assert experts == {"gate": (4, 24, 16), "up": (4, 24, 16), "down": (4, 16, 24)}
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    block = lillama.Layer.of_linears(gpt2, "transformer.h.0", (("attn.c_attn",),))
    assert block.weights[0].shape == (24, 8)


def recipe(tmp_path, **sections):
    return Recipe.parse(
        {
            "model": {"id": str(tmp_path / "model"), "dtype": "float32"},
            "plugin": "decoder",
            "compress": {"reduction": 0.05, "of": "weights", "rank_multiple": 2},
            "calibration": {"dataset": str(tmp_path / "data"), "sequence_length": 8},
            "distill": {"batch_size": 2},
            "run": {"out": str(tmp_path / "out"), "device": "cpu", "compute": "float32"},
        }
        | sections
    )


def test_batches_and_examples_are_what_the_files_hold(guided, tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(50)))
    plugin = guided.plugins["bytes"]
    batches = list(guided.calibration_stream(plugin, tiny(), recipe(tmp_path)))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    assert batches[2]["input_ids"].tolist()[1] == list(range(40, 48))
    row = {"question": "1+1=", "answer": "2"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row))
    asked = recipe(tmp_path, finetune={"dataset": str(tmp_path / "answers.jsonl")})
    (example,) = guided.finetune_data(guided.plugins["answers"], tiny(), asked, None)
    assert example["labels"].tolist() == [-100] * 4 + [ord("2")]
    assert bytes(example["input_ids"].tolist()) == b"1+1=2"


def test_other_hooks_answer_as_the_page_says(guided):
    model, plugins = tiny("llama-bias"), guided.plugins
    assert 0 < guided.evaluate(plugins["entropy"], model, None)["entropy/nats"] < 5
    assert guided.auto_class(WhisperConfig(), None, "speech").__name__ == "AutoModelForSpeechSeq2Seq"
    assert guided.auto_class(LlamaConfig(), None, "speech") is None
    found = plugins["renamed"].module.configuration({"model_type": "my_llama", "hidden_size": 64, "auto_map": {}})
    assert type(found) is LlamaConfig and found.hidden_size == 64
    assert plugins["renamed"].module.configuration({"model_type": "llama"}) is None
    assert guided.shared_modules(plugins["shared"], model, None) == [[f"model.layers.{i}.mlp" for i in range(3)]]
    assert guided.doctor(plugins["kernels"])[0].startswith("convolutions: ")
    inputs = token_batches(model)[0]
    with torch.no_grad():
        before = model(**inputs).logits
        guided.prepare(plugins["fast"], model, None)
        assert "forward" in vars(model.model.norm)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.report
def test_everything_that_has_a_name_serves_one_run(guided, tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    asked = recipe(
        tmp_path,
        compress={
            "reduction": 0.05, "of": "weights", "rank_multiple": 2,
            "init": "scaled", "strategy": "spare_ends", "storage": "turned",
        },
        distill={"batch_size": 2, "objective": "huber", "loss": "mostly_student", "schedule": "timed"},
        calibration={"dataset": "counting:12", "split": "train[:10]", "sequence_length": 16},
        evaluate={"repeats": {"prompt": "the cat", "new_tokens": 5}, "repeats/short": {"prompt": "a", "new_tokens": 2}},
    )  # fmt: skip
    result = lillama.compress(asked)
    assert set(result.plan.ranks) and all(name.startswith("model.layers.1.") for name in result.plan.ranks)
    assert set(result.metrics["after"]) == {"repeats/share", "short/share"}
    out = tmp_path / "out"
    assert any(json.loads(line)["event"] == "timed" for line in (out / "events.jsonl").read_text().splitlines())
    assert 'fill="#4477aa"' in (out / "report.html").read_text()
    model = lillama.load(out / "model")
    assert any(name.endswith("up_proj.P") for name, _ in model.named_parameters())
    assert cli.main(["export", str(out / "model"), str(tmp_path / "listing"), "--as", "listing"]) == 0
    assert "model.layers.1.mlp.up_proj.Q" in (tmp_path / "listing" / "tensors.txt").read_text()


def test_the_test_of_the_page_is_one(guided, tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "CHECKS", contract.CHECKS[:1])
    module("test_gpt_neox").test_contract(tmp_path)
    assert (tmp_path / "model" / "config.json").exists()
    for check in lillama.testing.contract.CHECKS:
        assert f"| {check.name} |" in PAGE
