"""A directory never makes code run by itself: whoever opens it asks for that, or nothing happens."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer

import lillama
from lillama import LillamaError
from lillama.base.files import write_json
from lillama.checkpoint.export import export_dense
from lillama.checkpoint.open import find_plugin, open_model
from lillama.cli import main as cli
from lillama.evaluate.measure import asked_of

GOLDEN = Path(__file__).parent.parent / "golden"
RECIPE = """
model: {{id: {home}/model, dtype: float32, trust_remote_code: true}}
compress: {{reduction: 0.1, of: weights}}
calibration: {{dataset: {home}/text.txt, sequence_length: 16}}
evaluate: {evaluate}
run: {{out: {home}/out, device: cpu, compute: float32}}
"""
PERPLEXITY = "perplexity: {{dataset: {home}/text.txt, sequence_length: 16, tokens: 64}}"


class Planted:
    """Pickled, it touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, a checkpoint, a text, and code that touches `ran`."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    tiny("mistral").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    shutil.copytree(GOLDEN / "linear-pivoted" / "model", tmp_path / "checkpoint")
    tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran . " * 60)
    return tmp_path


def plant(home: Path, *names: str) -> None:
    """Python in the model and the checkpoint that touches a file when it is imported."""
    for place in ("model", "checkpoint"):
        for name in names:
            file = home / place / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"open({str(home / 'ran')!r}, 'w').close()\nclass Own: pass\ndef generate(*a, **k): pass\n")


def change(file: Path, **keys: Any) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | keys))


def evaluate(home: Path, place: str, *more: str) -> int:
    return cli.main(["eval", str(home / place), "--set", f"evaluate={{{PERPLEXITY.format(home=home)}}}", *more])


AUTO = {
    "AutoConfig": "own.Own",
    "AutoModel": "own.Own",
    "AutoModelForCausalLM": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
    "AutoProcessor": "own.Own",
}
ELSEWHERE = dict.fromkeys(AUTO, "someone/elsewhere--own.Own")


@pytest.mark.parametrize("named", [AUTO, ELSEWHERE])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_auto_maps_are_not_followed(home: Path, named: Any, file: str) -> None:
    plant(home, "own.py")
    for place in ("model", "checkpoint"):
        change(home / place / file, auto_map=named, tokenizer_class="Own", processor_class="Own")
        evaluate(home, place)
        with contextlib.suppress(LillamaError):
            find_plugin(home / place, None)
        with contextlib.suppress(LillamaError):
            open_model(home / place)
    assert not (home / "ran").exists()


@pytest.mark.parametrize("named", [["Own"], ["pipeline"], ["AutoModel"], ["utils"]])
def test_a_class_that_is_no_model_is_refused(home: Path, named: list[str]) -> None:
    plant(home, "own.py")
    change(home / "checkpoint" / "config.json", architectures=named, auto_map={"pipeline": "own.Own", "x": "own.utils"})
    with pytest.raises(LillamaError, match=f"no model class '{named[0]}'"):
        lillama.load(home / "checkpoint")
    assert cli.main(["export", str(home / "checkpoint"), str(home / "dense"), "--dense"]) == 2
    assert not (home / "ran").exists() and not (home / "dense").exists()
    with pytest.raises(LillamaError):  # trusted, it is not just any function of transformers either
        lillama.load(home / "checkpoint", trust_remote_code=True)


def test_custom_generation_code_stays_where_it_is(home: Path) -> None:
    plant(home, "custom_generate/generate.py")
    for place in ("model", "checkpoint"):
        ids = torch.arange(4)[None]
        open_model(home / place).generate(ids, max_new_tokens=2, pad_token_id=0)
    assert not (home / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_kernels_of_the_hub_are_not_asked_for(home: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("model", "checkpoint"):
        for value in ("someone/kernel", "kernels-community/flash-attn2", "paged|someone/kernel@main:name"):
            change(home / place / "config.json", **{key: value})
            assert evaluate(home, place) == 2
            assert "would be downloaded and run" in capsys.readouterr().err
        change(home / place / "config.json", **{key: "eager", "text_config": {key: "someone/kernel"}})
        assert evaluate(home, place) == 2
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(home=home, evaluate="{}").replace(", trust_remote_code: true", ""))
    assert cli.main(["plan", str(recipe)]) == 2
    assert "would be downloaded and run" in capsys.readouterr().err


def test_pickles_are_never_opened(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("model", "checkpoint"):
        torch.save({"a": Planted(home / "ran")}, home / place / "pytorch_model.bin")
        (home / place / "model.safetensors").unlink()
        assert evaluate(home, place) == 2
        assert "only pickled weights" in capsys.readouterr().err
        for attempt in (open_model, lillama.load):
            with pytest.raises(LillamaError, match="only pickled weights"):
                attempt(home / place)
    with (home / "model" / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Planted(home / "ran"), file)
    assert evaluate(home, "model") == 2
    assert not (home / "ran").exists()


def test_an_adapter_does_not_take_the_model_s_place(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Planted(home / "ran")}, home / "model" / "adapter_model.bin")
    for place in ("model", "checkpoint"):
        change(home / place / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(home / "model"))
        assert evaluate(home, place) == 2
        assert "an adapter stands beside the model" in capsys.readouterr().err
        with pytest.raises(LillamaError, match="an adapter"):
            lillama.load(home / place)
    assert not (home / "ran").exists()


def run_directory(home: Path, evaluate: str) -> Path:
    """A run directory of a stranger's, with a recipe that asks for trust itself."""
    strangers = home / "strangers"
    shutil.copytree(home / "checkpoint", strangers / "model")
    (strangers / "recipe.resolved.yaml").write_text(RECIPE.format(home=home, evaluate=evaluate))
    return strangers


TASK = """
task: planted
dataset_path: json
dataset_kwargs: {{data_files: {{test: {home}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: !function planted.text
doc_to_target: 0
doc_to_choice: [a, b]
"""


@pytest.mark.slow
def test_tasks_of_a_directory_do_not_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    tasks = home / "tasks"
    tasks.mkdir()
    (home / "rows.jsonl").write_text('{"a": 1}\n')
    (tasks / "planted.yaml").write_text(TASK.format(home=home))
    (tasks / "planted.py").write_text(f"open({str(home / 'ran')!r}, 'w').close()\ndef text(doc): return 'a'\n")
    strangers = run_directory(home, f"{{harness/x: {{tasks: [planted], include: {tasks}}}}}")
    assert cli.main(["eval", str(strangers)]) == 2
    said = capsys.readouterr().err
    assert "evaluate.harness/x.include" in said and "--trust-remote-code" in said and str(tasks) in said
    assert cli.main(["eval", str(strangers), "--set", "evaluate.harness/x.limit=1"]) == 2
    assert not (home / "ran").exists()
    capsys.readouterr()
    # The user's own word is enough, by key or for all.
    for asked in (f"evaluate.harness/x.include={tasks}", f"evaluate={{harness: {{include: {tasks}}}}}"):
        assert asked_of(strangers, strangers / "model", None, [asked]).evaluate
    cli.main(["eval", str(strangers), "--trust-remote-code"])
    assert "this recipe came with the directory" not in capsys.readouterr().err
    assert (home / "ran").exists()


def test_modules_are_not_imported_for_a_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "site").mkdir()
    (home / "site" / "planted_texts.py").write_text(
        f"open({str(home / 'ran')!r}, 'w').close()\ntexts = ['the cat sat on a mat'] * 99\n"
    )
    monkeypatch.syspath_prepend(str(home / "site"))
    strangers = run_directory(home, "{perplexity: {dataset: package:planted_texts, sequence_length: 16, tokens: 64}}")
    assert cli.main(["eval", str(strangers)]) == 2
    assert "imports a module, and this recipe came with the directory" in capsys.readouterr().err
    assert not (home / "ran").exists() and "planted_texts" not in sys.modules
    assert cli.main(["eval", str(strangers), "--set", f"evaluate={{{PERPLEXITY.format(home=home)}}}"]) == 0
    asked = ["--set", "evaluate.perplexity.dataset=package:planted_texts"]
    assert cli.main(["eval", str(strangers), *asked]) == 0, capsys.readouterr().err
    assert (home / "ran").exists()


def test_finding_the_original_imports_no_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "site" / "planted").mkdir(parents=True)
    (home / "site" / "planted" / "__init__.py").write_text(f"open({str(home / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(home / "site"))
    strangers = run_directory(home, "{}")
    recipe = strangers / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace(f"{home}/model", "package:planted.inside"))
    assert cli.main(["bench", str(strangers), "--lengths", "4"]) == 2
    assert not (home / "ran").exists()


def test_the_quickstart_s_own_data_need_no_word(home: Path) -> None:
    options = "dataset: package:pydoc_data.topics, sequence_length: 16, tokens: 32"
    assert cli.main(["eval", str(run_directory(home, f"{{perplexity: {{{options}}}}}"))]) == 0


def test_export_runs_a_model_s_code_where_it_is_told_to(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[bool] = []

    def load(path: Path, *, trust_remote_code: bool) -> Any:
        told.append(trust_remote_code)
        raise LillamaError("enough")

    monkeypatch.setattr("lillama.checkpoint.export.load", load)
    for more in ([], ["--trust-remote-code"]):
        assert cli.main(["export", str(home / "checkpoint"), str(home / "dense"), "--dense", *more]) == 2
    assert told == [False, True]
    with pytest.raises(LillamaError, match="enough"):
        export_dense(home / "checkpoint", home / "dense")


@pytest.mark.report
@pytest.mark.parametrize("name", ["report.html", "bench.json"])
def test_links_in_a_directory_are_replaced_not_written_through(home: Path, name: str) -> None:
    shutil.copytree(GOLDEN / "run", home / "run")
    mine = home / "mine"
    mine.write_text("mine")
    write: Callable[[], Any] = lambda: write_json(home / "run" / name, {"rows": []})  # noqa: E731
    if name == "report.html":
        write = lambda: cli.main(["report", str(home / "run")])  # noqa: E731
    for link in (name, f".{name}.{os.getpid()}.part"):
        (home / "run" / link).unlink(missing_ok=True)
        (home / "run" / link).symlink_to(mine)
        write()
        assert mine.read_text() == "mine"
        assert (home / "run" / name).is_file() and not (home / "run" / name).is_symlink()
