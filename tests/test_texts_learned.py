"""Text that the original writes for training alone: mixed with the data, learned from its predictions alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import CONFIGS, tokenizer
from transformers import AutoModelForCausalLM

from lillama.base.progress import Progress
from lillama.base.rundir import LEARNED_TEXT, OWN_TEXT
from lillama.errors import LillamaError
from lillama.finetune.data import SHARE, text_examples
from lillama.recipe.schema import Recipe
from lillama.run import duration, owntext, pipeline, prepare
from lillama.run.common import Common
from lillama.run.estimate import estimate
from lillama.run.speeds import Speeds

WRITES = {"length": 12, "batch": 4, "begin": ["start"], "weight": 2, "temperature": 1.2}
LEARNS = {"sequence_length": 16, "steps": 2, "batch_size": 2, "teacher": 0.75, "holdout": 0.25, "checks": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of the tokenizer's own twelve tokens, and a file of text beside it."""
    home = tmp_path_factory.mktemp("texts")
    config = copy.deepcopy(CONFIGS["mistral"])
    config.vocab_size = 12
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    (home / "cat.txt").write_text(f"{' '.join(['cat'] * 8)} \n\n" * 60)
    return home


def recipe(home, out, calibration=None, **finetune):
    return Recipe.parse(
        {
            "model": {"id": str(home / "model"), "dtype": "float32"},
            "compress": {"reduction": 0.1, "of": "weights", "strategy": "uniform", "init": "svd", "rank_multiple": 2},
            "calibration": {"dataset": str(home / "cat.txt"), "sequence_length": 16, "tokens": 96}
            | (calibration or {}),
            "distill": {"batch_size": 4, "epochs": 0},
            "finetune": LEARNS | {"generate": WRITES, "tokens": 192} | finetune,
            "run": {"out": str(out), "device": "cpu", "compute": "float32"},
        }
    )


@pytest.fixture
def rounds_written(monkeypatch):
    """For every round that is written, its temperatures."""
    done, write = [], owntext.write_round

    def watched(model, reader, begin, how, this):
        done.append(how.temperatures)
        return write(model, reader, begin, how, this)

    monkeypatch.setattr(owntext, "write_round", watched)
    return done


def test_what_the_original_writes_is_mixed_with_the_data_of_the_calibration(home, tmp_path, rounds_written):
    asked = recipe(home, tmp_path)
    result = pipeline.Run(prepare.prepare(asked), Progress()).execute()
    assert result.path.name == "finetuned" and not (tmp_path / OWN_TEXT).exists()
    texts = (tmp_path / LEARNED_TEXT).read_text().splitlines()
    assert len(texts) * 12 >= 128 + 16 == asked.learned_written  # two thirds of 192, and an eighth
    assert set(rounds_written) == {(1.2,)}
    examples = text_examples(tokenizer(), asked, asked.finetune, lambda of: {"finetune": tmp_path / LEARNED_TEXT}[of])
    assert sorted(float(one[SHARE]) for one in examples) == [0.75] * 4 + [1.0] * 8
    cats = [one for one in examples if float(one[SHARE]) == 0.75]
    assert all(set(one["input_ids"].tolist()) <= {5, 2} for one in cats)
    written = len(rounds_written)
    pipeline.Run(prepare.prepare(asked), Progress()).execute()
    assert len(rounds_written) == written  # nothing is left to do


def test_both_kinds_of_own_text_are_kept_apart(home, tmp_path, rounds_written):
    calibration = {"dataset": None, "generate": WRITES | {"temperature": 1.0}, "tokens": 96}
    asked = recipe(home, tmp_path, calibration)
    pipeline.Run(prepare.prepare(asked), Progress()).execute()
    assert set(rounds_written) == {(1.0,), (1.2,)}
    assert (tmp_path / OWN_TEXT).read_bytes() != (tmp_path / LEARNED_TEXT).read_bytes()
    files = {"calibration": tmp_path / OWN_TEXT, "finetune": tmp_path / LEARNED_TEXT}
    examples = text_examples(tokenizer(), asked, asked.finetune, files.__getitem__)
    assert len(examples) == 12 and all(float(one[SHARE]) == 1 for one in examples)


def test_runs_of_one_sweep_have_it_written_once(home, tmp_path, rounds_written):
    common, files, rounds = Common(tmp_path / "common"), [], []
    for place, steps in (("a", 2), ("b", 3)):
        asked = recipe(home, tmp_path / place, steps=steps)
        pipeline.Run(prepare.prepare(asked), Progress(), common=common).execute()
        files.append((tmp_path / place / LEARNED_TEXT).read_bytes())
        rounds.append(len(rounds_written))
    assert files[0] == files[1]
    assert rounds[0] == rounds[1] > 0


def test_it_is_mixed_with_data_of_the_section_too(home, tmp_path):
    data = [{"dataset": str(home / "cat.txt"), "weight": 2, "teacher": 0.5}]
    asked = recipe(home, tmp_path, datasets=data)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "ran " * 150}) + "\n")
    examples = text_examples(tokenizer(), asked, asked.finetune, lambda of: tmp_path / "own.jsonl")
    assert sorted(float(one[SHARE]) for one in examples) == [0.5] * 6 + [1.0] * 6
    with pytest.raises(LillamaError, match=r"finetune\.generate"):
        text_examples(tokenizer(), asked, asked.finetune)


@pytest.mark.parametrize(
    "given, calibration, said",
    [
        ({"tokens": None}, {"tokens": None}, r"finetune\.tokens: a mixture needs tokens"),
        ({"generate": WRITES | {"tokens": 100}}, {}, r"finetune\.generate\.tokens: 100 are fewer than the 128"),
        (
            {"generate": WRITES | {"weight": 0.001}},
            {},
            r"finetune\.tokens: of 192 tokens in sequences of 16, not every",
        ),
        ({"generate": WRITES | {"prompts": "./gone.txt"}}, {}, r"finetune\.generate\.prompts: there is no file"),
        ({"generate": WRITES | {"length": 65}}, {}, r"finetune\.generate\.length: .* longer than the 64 positions"),
        ({"generate": WRITES | {"begin": []}}, {}, "begins its texts with nothing"),
    ],
)
def test_what_cannot_be_written_is_told_when_a_run_is_planned(home, tmp_path, given, calibration, said):
    with pytest.raises(LillamaError, match=said):
        prepare.prepare(recipe(home, tmp_path / "run", calibration, **given))


def test_an_estimate_has_the_writing_in_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "measure_speeds", lambda run: Speeds(*[1e6] * len(Speeds._fields)))
    seconds = []
    for tokens in (240, 480):
        found = prepare.prepare(recipe(home, tmp_path, generate=WRITES | {"tokens": tokens}))
        seconds.append(estimate(found.source, found.plan, found.recipe, found.device).seconds)
    assert seconds[1] - seconds[0] == pytest.approx(duration.WRITING * 2 * found.plan.before * 240 / 1e6)
