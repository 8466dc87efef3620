"""What a recipe asks that this model or this machine cannot give: said at planning, with nothing written."""

from __future__ import annotations

import pytest
from conftest import tiny, tokenizer

from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe
from lillama.run.prepare import prepare
from lillama.testing import recipe_for


@pytest.fixture
def home(tmp_path):
    tiny("llama-bias").save_pretrained(tmp_path / "model")  # 64 positions
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 50)
    return tmp_path


def planned(home, *overrides):
    settings = recipe_for(home / "model", home / "run").model_dump(mode="json")
    return prepare(Recipe.parse(settings, overrides))


def refused(home, *overrides):
    with pytest.raises(LillamaError) as caught:
        planned(home, *overrides)
    assert not (home / "run").exists()
    return caught.value


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("calibration.sequence_length=65", "calibration.sequence_length"),
        ("finetune.sequence_length=65", "finetune.sequence_length"),
        (
            "evaluate.perplexity/a={dataset: a/b, sequence_length: 65}",
            "evaluate.perplexity/a.sequence_length",
        ),
        ("evaluate.stable_rank.sequence_length=65", "evaluate.stable_rank.sequence_length"),
    ],
)
def test_a_sequence_is_no_longer_than_the_model(home, override, where):
    error = refused(home, override)
    assert error.where == where
    assert "sequences of 65 tokens are longer than the 64 positions of the model" in error.what
    assert planned(home, override.replace("65", "64"))


def test_a_model_without_positions_takes_any_length(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    assert planned(tmp_path, "calibration.sequence_length=100000")


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("*.down_prj", "Did you mean 'down_proj'?"),
        ("*.layers.1.*.qproj", "Did you mean 'q_proj'?"),
        ("down_proj", "A glob stands for whole names: '*down_proj' for all that end so. Did you mean 'down_proj'?"),
        ("*.experts", "Known: "),
    ],
)
def test_a_glob_that_nothing_is_called_is_refused(home, glob, hint):
    error = refused(home, f"compress.skip=['*.up_proj', '{glob}']")
    assert error.where == "compress.skip"
    assert f"no weight is called '{glob}'" in error.what
    assert hint in error.hint


@pytest.mark.parametrize("glob", ["*.down_proj", "model.layers.0.*", "lm_head", "*norm*", "*.bias"])
def test_a_glob_may_name_what_is_dense_anyway(home, glob):
    assert planned(home, f"compress.skip=['{glob}']")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("evaluate.perplexity.dataset=./nowhere.txt", "evaluate.perplexity.dataset"),
        ("evaluate.perplexity/x.dataset=nowhere.jsonl.gz", "evaluate.perplexity/x.dataset"),
        ("evaluate.stable_rank.dataset=/nowhere/at/all", "evaluate.stable_rank.dataset"),
        ("evaluate.wer.dataset=~/nowhere/at/all", "evaluate.wer.dataset"),
        ("evaluate.harness.files=./nowhere", "evaluate.harness.files"),
        ("evaluate.harness.files={piqa: nowhere.jsonl}", "evaluate.harness.files"),
        ("evaluate.harness.files={piqa: {test: ./nowhere.parquet}}", "evaluate.harness.files"),
        ("evaluate.harness.include=../nowhere", "evaluate.harness.include"),
        ("finetune.dataset=./nowhere.txt", "finetune.dataset"),
        (f"evaluate.perplexity.dataset=./{'long' * 100}", "evaluate.perplexity.dataset"),
        ("evaluate.perplexity.dataset=~nobody-of-that-name/x", "evaluate.perplexity.dataset"),
    ],
)
def test_data_of_an_evaluation_that_is_missing_is_told_at_planning(home, override, where):
    error = refused(home, override)
    assert error.where == where
    assert "there is no file" in error.what


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.perplexity.dataset=some/dataset",
        "evaluate.perplexity.dataset=package:pydoc_data.topics",
        "evaluate.perplexity.dataset={home}/text.txt",
        "evaluate.harness.files={home}",
        "evaluate.harness.tasks=[paper]",
        "evaluate.sample.prompt=./this is a text.txt",
        "finetune.dataset={home}/text.txt",
    ],
)
def test_other_data_is_left_alone(home, override):
    assert planned(home, override.replace("{home}", str(home)))


def test_planning_for_a_model_that_is_not_at_hand_needs_no_data(home):
    from transformers import AutoConfig

    settings = recipe_for(home / "model", home / "run").model_dump(mode="json")
    recipe = Recipe.parse(settings, ["evaluate.perplexity.dataset=./nowhere.txt"])
    assert prepare(recipe, AutoConfig.from_pretrained(home / "model"))
