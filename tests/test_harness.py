"""lm-eval on models in memory and on local files: offline, every file written here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import WORDS, tiny, tokenizer

from lillama.cli import main as cli
from lillama.errors import LillamaError
from lillama.evaluate import rows
from lillama.evaluate import tasks as library
from lillama.evaluate.context import Context, evaluate
from lillama.evaluate.harness import harness
from lillama.recipe.schema import Recipe

TEXT = "the cat sat on a mat and ran"
LETTERS = "ABCD"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("mistral")


@pytest.fixture
def context() -> Context:
    return Context(tokenizer(), "cpu", where="evaluate.harness")


def jsonl(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def arc_rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "question": f"{WORDS[i % 8]} {WORDS[(3 * i) % 8]}",
            "choices": {"text": [f"{WORDS[(i + j) % 8]} {WORDS[j]}" for j in range(4)], "label": list(LETTERS)},
            "answerKey": LETTERS[i % 4],
        }
        for i in range(count)
    ]


def by_hand(model: Any, found: list[dict[str, Any]]) -> float:
    """Share of rows whose right choice has the largest likelihood after the task's own prompt."""
    words, right = tokenizer(), 0
    for row in found:
        scores = []
        for choice in row["choices"]["text"]:
            start = words(f"Question: {row['question']}\nAnswer:")["input_ids"]
            ids = words(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += max(range(4), key=scores.__getitem__) == LETTERS.index(row["answerKey"])
    return right / len(found)


def test_accuracy_on_a_file_is_that_of_the_likelihoods(model: Any, context: Context, tmp_path: Path) -> None:
    found = arc_rows(12)
    file = jsonl(tmp_path / "mine.jsonl", found)
    model.train()
    metrics = harness(model, context, tasks=["arc_easy"], files={"arc_easy": file}, batch_size=3)
    assert model.training, "left as it was found"
    model.eval()
    assert metrics["arc_easy/acc"] == pytest.approx(by_hand(model, found))
    p = metrics["arc_easy/acc"]
    assert metrics["arc_easy/acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 11))
    assert "average" not in " ".join(metrics), "of one task there is none"
    details = context.details
    assert {k: details[k] for k in ("limit", "fewshot", "batch_size", "dtype")} == {
        "limit": None, "fewshot": 0, "batch_size": 3, "dtype": "float32",
    }  # fmt: skip
    task = details["tasks"]["arc_easy"]
    assert task["examples"] == 12 and task["metric"] == "acc_norm" and len(task["hits"]) == 12
    assert task["data"]["test"][0]["file"] == "mine.jsonl"
    assert sum(map(int, task["hits"])) / 12 == pytest.approx(metrics["arc_easy/acc_norm"])
    json.dumps(details)


def test_the_same_as_lm_eval_finds_when_it_opens_the_model(model: Any, context: Context, tmp_path: Path) -> None:
    """As its command line does, less the ten seconds in which that reads the YAML of all its tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    file = jsonl(tmp_path / "arc_easy.test.jsonl", arc_rows(8))
    metrics = harness(model, context, tasks=["arc_easy"], files=str(tmp_path), limit=5)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    own = Path(library._tasks_folder() / "arc/arc_easy.yaml")
    (tmp_path / "task.yaml").write_text(library.local_yaml("arc_easy", own, {"test": [file]}, tmp_path, "x"))
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path}/model,dtype=float32",
        device="cpu",
        tasks=[str(tmp_path / "task.yaml")],
        limit=5,
        task_manager=TaskManager(include_defaults=False),
    )["results"]["arc_easy"]
    for name in ("acc", "acc_norm", "acc_stderr"):
        assert metrics[f"arc_easy/{name}"] == result[f"{name},none"]


def paper_files(folder: Path) -> None:
    """The paper's nine tasks, each in the shape in which its authors published it."""
    folder.mkdir()
    arc = [
        {"question": {"stem": "the cat", "choices": [{"text": w, "label": c} for w, c in zip(WORDS, LETTERS)]},
         "answerKey": "B"}
    ] * 2  # fmt: skip
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        jsonl(folder / f"{name}.test.jsonl", arc)
    jsonl(folder / "boolq.dev.jsonl", [{"question": "the cat sat", "passage": TEXT, "answer": True}] * 2)
    jsonl(folder / "piqa.valid.jsonl", [{"goal": "the cat", "sol1": "sat", "sol2": "ran", "label": 1}] * 2)
    social = {"context": "the cat", "question": "sat", "answerA": "on", "answerB": "a", "answerC": "mat", "label": "2"}
    jsonl(folder / "social_iqa.dev.jsonl", [social] * 2)
    winogrande = {"sentence": "the cat sat on _ and ran", "option1": "a mat", "option2": "cat", "answer": "1"}
    jsonl(folder / "winogrande.dev.jsonl", [winogrande] * 2)
    (folder / "logiqa.Test.txt").write_text("")  # not a split: passed over
    block = "\nb\nthe cat sat.on a mat.\nthe cat ?\nA.sat on\nB.a mat\nC.and\nD.ran\n"
    (folder / "logiqa.test.txt").write_text(block * 2)
    truth = [{"question": f"{w} cat", "mc2_targets": {f"{w} sat": 1, "on a mat": 0}} for w in WORDS[:2]]
    (folder / "truthfulqa_mc2.json").write_text(json.dumps(truth))


def test_the_papers_nine_tasks_on_files_as_published(model: Any, context: Context, tmp_path: Path) -> None:
    paper_files(tmp_path / "data")
    metrics = harness(model, context, files=str(tmp_path / "data"))
    main = [metrics[f"{name}/{known.metric}"] for name, known in library.PAPER.items()]
    assert len(main) == 9 and metrics["paper/average"] == pytest.approx(sum(main) / 9)
    errors = [metrics[f"{name}/{known.metric}_stderr"] for name, known in library.PAPER.items()]
    assert metrics["paper/average_stderr"] == pytest.approx(math.hypot(*errors) / 9)
    assert {task["examples"] for task in context.details["tasks"].values()} == {2}


def test_the_tasks_of_the_paper_are_where_lm_eval_has_them() -> None:
    for name, known in library.PAPER.items():
        text = (library._tasks_folder() / known.yaml).read_text()
        assert f"task: {name}\n" in text


def test_logiqa_blocks_become_the_rows_of_the_hub() -> None:
    text = "\n\na\nOne.Two.\nWhich?\nA.first\nB.second.\nC.third\nD.fourth\n"
    found = rows.logiqa(datasets.Dataset.from_dict({"text": [text]}))
    assert found[0] == {
        "label": "a", "context": "One. Two.", "question": "Which?",
        "options": ["first", "second.", "third", "fourth"],
    }  # fmt: skip


def test_truthful_answers_of_other_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "mc.json"
    file.write_text(json.dumps([{"question": str(i), "mc2_targets": {f"a{i}": 1, f"b{i}": 0}} for i in range(3)]))
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.truthfulqa(table)[1]["mc2_targets"] == {"choices": ["a1", "b1"], "labels": [1, 0]}


def test_any_task_of_lm_eval_takes_files(
    model: Any, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AfriMMLU in Hausa: choices as a list, where the hub has their text; a glob for its prompts."""
    from lm_eval.tasks import TaskManager

    folder = library._tasks_folder() / "afrimmlu/direct"
    small = TaskManager(include_defaults=False, include_path=[folder / f"prompt_{i}" for i in (1, 2)])
    monkeypatch.setattr(library, "_manager", lambda include: small)  # that of all tasks takes ten seconds
    row = {"subject": "the", "question": "cat sat", "choices": ["on", "a", "mat", "ran"], "answer": "C"}
    file = jsonl(tmp_path / "hau.jsonl", [row, row | {"answer": "A"}])
    pattern = "afrimmlu_direct_hau_prompt_*"
    metrics = harness(model, context, tasks=[pattern], files={pattern: file})
    for i in (1, 2):
        assert metrics[f"afrimmlu_direct_hau_prompt_{i}/acc"] in (0.0, 0.5)
        assert f"afrimmlu_direct_hau_prompt_{i}/f1" in metrics
    assert metrics["average"] == pytest.approx(sum(metrics[f"afrimmlu_direct_hau_prompt_{i}/acc"] for i in (1, 2)) / 2)
    with pytest.raises(LillamaError, match="no task 'afrimmlu_direct_hua_prompt_1'") as caught:
        harness(model, context, tasks=["afrimmlu_direct_hua_prompt_1"])
    assert "afrimmlu_direct_hau_prompt_1" in str(caught.value)


def test_an_untied_head_stays_untied(context: Context, tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    file = jsonl(tmp_path / "a.jsonl", arc_rows(2))
    harness(model, context, tasks=["arc_easy"], files={"arc_easy": file})
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie_weights" not in vars(model)


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such file": ({"files": {"arc_easy": "{tmp}/b.jsonl"}}, "there is no file", "files.arc_easy"),
    "no such folder": ({"files": "{tmp}/b"}, "there is no folder", "files"),
    "a file for no task": ({"files": {"arc_esay": "{tmp}/a.jsonl"}}, "no task is called 'arc_esay'", "arc_easy"),
    "no split": ({"files": {"arc_easy": {"testing": "{tmp}/a.jsonl"}}}, "'testing' is not a split", "validation"),
    "wrong rows": ({"files": {"arc_easy": "{tmp}/wrong.jsonl"}}, "no 'question'", "its columns are answer"),
    "no kind of file": ({"files": {"arc_easy": "{tmp}/a.xlsx"}}, "no kind that can be read", ".parquet"),
    "not on the machine": ({}, "the data of 'arc_easy' cannot be read", "files: {arc_easy: FILE}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_says_what_to_do(model: Any, context: Context, tmp_path: Path, mistake: str) -> None:
    options, says, hint = MISTAKES[mistake]
    jsonl(tmp_path / "a.jsonl", arc_rows(1))
    jsonl(tmp_path / "a.xlsx", arc_rows(1))
    jsonl(tmp_path / "wrong.jsonl", [{"answer": "A"}])
    given = json.loads(json.dumps(options).replace("{tmp}", str(tmp_path)))
    with pytest.raises(LillamaError) as caught:
        harness(model, context, tasks=["arc_easy"], **given)
    assert says in str(caught.value) and hint in str(caught.value)
    assert "evaluate.harness" in str(caught.value)


def test_metrics_of_a_recipe_are_named_after_tasks(model: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", arc_rows(3))
    options = {"tasks": ["arc_easy", "arc_challenge"], "files": {"arc_*": file}}
    recipe = Recipe.parse(
        {"model": {"id": "x"}, "compress": {"reduction": 0.2}, "calibration": {"dataset": "x.txt"},
         "run": {"out": "x"}, "evaluate": {"harness": options, "harness/two": options | {"limit": 2}}}
    )  # fmt: skip
    context = Context(tokenizer(), "cpu")
    metrics = evaluate(model, recipe.evaluate, context)
    assert {"arc_easy/acc", "arc_challenge/acc_norm", "harness/average", "two/arc_easy/acc", "two/average"} <= set(
        metrics
    )
    assert context.details["harness/two"]["tasks"]["arc_easy"]["examples"] == 2


def test_the_verb_measures_tasks_alone(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    found = arc_rows(3)
    jsonl(tmp_path / "data" / "arc_easy.jsonl", found)
    arguments = ["--tasks", "arc_easy", "--files", tmp_path / "data", "--device", "cpu", "--out", tmp_path / "o.json"]
    assert cli.main([str(a) for a in ("eval", tmp_path / "model", *arguments)]) == 0
    assert "arc_easy/acc" in capsys.readouterr().out
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["metrics"]["arc_easy/acc"] == pytest.approx(by_hand(model, found))
    assert written["details"]["harness"]["lm_eval"].startswith("0.4")
