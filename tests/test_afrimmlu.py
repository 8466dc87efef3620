"""AfriMMLU offline, before and after, by the recipe: lm-eval's own tasks on a local file of the hub's columns."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from conftest import SMALL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lillama import Recipe, compress
from lillama.evaluate import tasks

ROWS = [
    {"subject": "elementary_mathematics", "question": "Nawa ne 2 + 2 ?", "choices": "['3', '4', '5', '6']"},
    {"subject": "global_facts", "question": "Ina babban birnin ?", "choices": "['Kano', 'Abuja', 'Lagos', 'Jos']"},
    {"subject": "international_law", "question": "Wane ne ?", "choices": "['Ni', 'Kai', 'Shi', 'Mu']"},
    {"subject": "global_facts", "question": "Yaushe ne ?", "choices": "['Yau', 'Jiya', 'Gobe', 'Dare']"},
]
TEXT = "Nawa ne babban birnin Kano Abuja Lagos Jos Ni Kai Shi Mu Yau Jiya Gobe Dare A B C D ."


@pytest.fixture
def manager(monkeypatch):
    """Of Hausa's tasks alone: that of all tasks takes ten seconds to build."""
    from lm_eval.tasks import TaskManager

    folder = tasks._tasks_folder() / "afrimmlu"
    paths = [folder / kind / f"prompt_{i}" for kind in ("direct", "translate") for i in range(1, 6)]
    small = TaskManager(include_defaults=False, include_path=paths)
    monkeypatch.setattr(tasks, "_manager", lambda include: small)


@pytest.fixture
def model(tmp_path):
    """A tiny InkubaLM with a tokenizer that knows the words of the questions."""
    torch.manual_seed(3)
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(TEXT.split())]
    auto_map = {"AutoModelForCausalLM": "vulavulaslm.VulavulaLlamaForCausalLM"}
    shape = SMALL | {"max_position_embeddings": 256, "vocab_size": 900}
    built = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False, auto_map=auto_map)).float()
    for layer in built.model.layers[1:]:
        layer.mlp.load_state_dict(built.model.layers[0].mlp.state_dict())
    built.save_pretrained(tmp_path / "model")
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_recipe_runs_offline_on_local_files(model, manager, tmp_path):
    file = tmp_path / "hau.jsonl"
    answers = "BBCA"
    file.write_text("".join(json.dumps(row | {"answer": a}) + "\n" for row, a in zip(ROWS, answers)))
    text = tmp_path / "hausa.jsonl"
    rows = [{"text": TEXT, "language": "hau" if i % 2 else "swa"} for i in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        f"model.id={model}",
        f"calibration.dataset={text}",
        "calibration.config=null",
        "calibration.sequence_length=16",
        "compress.rank_multiple=1",
        "distill.batch_size=4",
        "run.device=cpu",
        f"run.out={tmp_path / 'run'}",
        *(f'evaluate.harness/afrimmlu_{kind}.files={{"*": {file}}}' for kind in ("direct", "translate")),
    ]
    result = compress(Recipe.load("recipes/inkubalm_hausa30.yaml", changes))
    for when in ("before", "after"):
        found = result.metrics[when]
        details = json.loads((tmp_path / "run" / f"evaluation.{when}.json").read_text())["details"]
        for kind in ("direct", "translate"):
            names = [f"afrimmlu_{kind}_hau_prompt_{i}" for i in range(1, 6)]
            each = [found[f"afrimmlu_{kind}/{name}/acc"] for name in names]
            assert found[f"afrimmlu_{kind}/average"] == pytest.approx(sum(each) / 5)
            # The prompts ask the same questions: the error of their mean is that of the mean over questions.
            hits = [details[f"harness/afrimmlu_{kind}"]["tasks"][name]["hits"] for name in names]
            by_question = [sum(map(int, column)) / 5 for column in zip(*hits)]
            error = statistics.stdev(by_question) / len(ROWS) ** 0.5
            assert len(by_question) == len(ROWS)
            assert found[f"afrimmlu_{kind}/average_stderr"] == pytest.approx(error)
