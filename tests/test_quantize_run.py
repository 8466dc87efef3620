"""Runs that end in few bits: what they leave and say, what goes on, what is made anew, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny, tokenizer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import lillama
from lillama.base.rundir import RunDirectory
from lillama.bits import stage
from lillama.cli import main as cli
from lillama.cli import show
from lillama.evaluate import bench, measure
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.swap import count_parameters, factor_modules
from lillama.recipe.schema import Recipe
from lillama.report import fewbits as fewbits_report
from lillama.report import html, record
from lillama.run import pipeline

TEXT = "the cat sat on a mat and ran . " * 60
TUNED = {"sequence_length": 16, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "checks": 1}


def settings(home: Path, name: str = "llama", **changes: Any) -> dict[str, Any]:
    if not (home / "model").exists():
        tiny(name).save_pretrained(home / "model")
        tokenizer().save_pretrained(home / "model")
        (home / "text.txt").write_text(TEXT)
    given: dict[str, Any] = {
        "model": {"id": str(home / "model"), "dtype": "float32"},
        "compress": {"reduction": 0.2, "of": "weights", "rank_multiple": 2, "strategy": "uniform", "init": "svd"},
        "distill": {"batch_size": 2, "epochs": 0},
        "calibration": {"dataset": str(home / "text.txt"), "sequence_length": 16, "tokens": 256},
        "quantize": {"bits": 4, "what": "all"},
        "evaluate": {"perplexity": {"dataset": str(home / "text.txt"), "sequence_length": 16, "tokens": 64}},
        "run": {"out": str(home / "run"), "device": "cpu", "compute": "float32"},
    }
    return given | changes


def recipe(home: Path, name: str = "llama", **changes: Any) -> Recipe:
    return Recipe.parse(settings(home, name, **changes))


def weights_of(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def events(out: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] in kinds]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 19)[None]).logits
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run from the command line: a tied model, fine-tuned, everything in few bits, drawn."""
    home = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILLAMA_CACHE", str(home / "cache"))
        given = settings(home, finetune=TUNED)
        given["evaluate"]["sample"] = {"prompt": "the cat", "new_tokens": 2}
        (home / "recipe.yaml").write_text(yaml.safe_dump(given))
        assert cli.main(["run", str(home / "recipe.yaml")]) == 0
    return home


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a finished run in full, to which few bits are added in copies."""
    home = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILLAMA_CACHE", str(home / "cache"))
        pipeline.compress(recipe(home, quantize=None))
    return home


@pytest.fixture
def out(plain: Path, tmp_path: Path) -> Path:
    """A copy of that run's directory."""
    shutil.copytree(plain / "run", tmp_path / "run")
    return tmp_path / "run"


def going_on(plain: Path, out: Path, **changes: Any) -> Recipe:
    """The recipe of such a copy."""
    return recipe(plain, run={**settings(plain)["run"], "out": str(out)}, **changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))


def test_a_run_ends_with_a_checkpoint_in_few_bits_that_was_measured(finished: Path) -> None:
    out = finished / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["quantized"].keys() == metrics["after"].keys()
    assert metrics["quantized"]["perplexity/perplexity"] < 1.1 * metrics["finetuned"]["perplexity/perplexity"]
    assert metrics["bytes"]["quantized"] == len(weights_of(out / "quantized"))
    assert metrics["bytes"]["quantized"] < 0.4 * metrics["bytes"]["after"]
    assert metrics["seconds"]["quantize"] > 0
    model = lillama.load(out / "quantized", verify=True)
    modules = dict(factor_modules(model))
    assert len(modules) == 3 * 7 + 2
    assert all(isinstance(module.storage, Rounded) for module in modules.values())
    assert modules["model.embed_tokens"].storage.bits == 8 and modules["lm_head"].storage.bits == 8
    assert count_parameters(model) == metrics["parameters"]["quantized"]
    with safe_open(out / "quantized" / "model.safetensors", "pt") as file:
        ends = {key for key in file.keys() if key.startswith("lm_head")}  # noqa: SIM118
    assert ends == {"lm_head.weight"}, "a tied head has no numbers of its own"
    config = json.loads((out / "quantized" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2
    assert "4 bits" in (out / "quantized" / "README.md").read_text()
    assert {path.name for path in (out / "quantized").iterdir()} >= {"tokenizer.json", "lillama.manifest.json"}


def test_the_same_command_does_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "run"
    before, count = weights_of(out / "quantized"), len(events(out, "quantized"))
    assert cli.main(["run", str(finished / "recipe.yaml")]) == 0
    assert weights_of(out / "quantized") == before and len(events(out, "quantized")) == count
    said = capsys.readouterr().out
    assert f'from_pretrained("{out}/quantized")'.replace(" ", "") in said.replace("\n", "").replace(" ", "")


def test_another_section_is_refused_by_name_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = (finished / "run" / "recipe.resolved.yaml").read_bytes()
    assert cli.main(["run", str(finished / "recipe.yaml"), "--set", "quantize.group_size=64"]) == 2
    said = capsys.readouterr().err
    assert "quantize.group_size: the run holds a result in few bits with another group_size" in said
    assert str(finished / "run" / "quantized") in said
    assert (finished / "run" / "recipe.resolved.yaml").read_bytes() == resolved


def test_the_last_table_has_the_quantised_model_with_its_bytes(finished: Path) -> None:
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    found = pipeline.Result(finished / "run" / "quantized", None, metrics)  # type: ignore[arg-type]
    console = Console(width=140)
    with console.capture() as said:
        console.print(show.result(found, recipe(finished)))
    lines = [line.split() for line in said.get().splitlines()]
    head = next(line for line in lines if "before" in line)
    assert head == ["before", "after", "change", "fine-tuned", "change", "quantised", "change"]
    on_disk = next(line for line in lines if line[:3] == ["weights", "on", "disk"])
    assert on_disk[-3:-1] == [f"{metrics['bytes']['quantized'] / 1024:.0f}", "KiB"]
    assert on_disk[-1] == f"{metrics['bytes']['quantized'] / metrics['bytes']['before'] - 1:+.1%}"
    assert any(line[:1] == ["perplexity/perplexity"] for line in lines), "names are not cut off"


@pytest.mark.report
def test_the_report_shows_the_stage_its_forms_and_where_it_is(finished: Path) -> None:
    held = record.read(finished / "run")
    text = html.render(held)
    assert "<th>quantised</th>" in text and '<blockquote class="quantised">' in text and "not drawn" not in text
    assert f"{finished}/run/quantized" in text
    table = {row["kind"]: row for row in fewbits_report.rows(held)}
    assert table["mlp.gate_proj"]["bits"] == "4 in groups of 32" and float(table["mlp.gate_proj"]["loss"]) > 0
    assert sum(int(part.split(" x ")[0]) for part in table["mlp.gate_proj"]["forms"].split(", ")) == 3
    assert table["lm_head"] == {"kind": "lm_head", "forms": "1 x dense", "bits": "8 in groups of 32", "loss": ""}
    tiles = {what: value for what, value, _ in html.tiles(held)}
    sizes = held.metrics["bytes"]
    assert tiles["weights on disk"] == f"{1 - sizes['quantized'] / sizes['before']:.1%} less"


def test_verify_eval_bench_and_export_know_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, few = finished / "run", finished / "run" / "quantized"
    assert cli.main(["verify", str(run)]) == 0 and cli.main(["verify", str(few)]) == 0
    assert measure.checkpoint_of(run) == few and bench.models_of([str(run)]).compressed == str(few)
    assert measure.checkpoint_of(run / "model") == run / "model"
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--json"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out)["perplexity/perplexity"] == pytest.approx(
        metrics["quantized"]["perplexity/perplexity"], rel=1e-4
    )
    assert cli.main(["export", str(few), str(tmp_path / "dense"), "--dense"]) == 0
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not list(factor_modules(dense)) and dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.allclose(logits(dense), logits(lillama.load(few)), atol=1e-4)
    capsys.readouterr()
    assert cli.main(["export", str(few), str(tmp_path / "alone"), "--standalone"]) == 2
    said = capsys.readouterr().err
    assert "'dense:8:32' is one of few bits" in said and "plugin" not in said
    assert not (tmp_path / "alone").exists()
    damaged = bytearray(weights_of(few))
    damaged[-1] ^= 1
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    (copy / "model.safetensors").write_bytes(bytes(damaged))
    assert cli.main(["verify", str(copy)]) == 1


def test_what_was_loaded_saves_itself_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    few = finished / "run" / "quantized"
    for dtype in (torch.float32, torch.bfloat16):
        lillama.load(few, dtype=dtype).save_pretrained(tmp_path / str(dtype))
        again, held = (load_file(place / "model.safetensors") for place in (tmp_path / str(dtype), few))
        assert again.keys() == held.keys()
        for key, tensor in held.items():
            if key.endswith(("_codes", "_scale", "pivots")):
                assert torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype, key


def test_every_number_for_itself_without_data_and_without_a_loss(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lillama.bits.moments._run", lambda *_: pytest.fail("no data are to be read"))
    section = {"bits": 4, "method": "nearest", "what": "factors", "group_size": 64}
    result = pipeline.compress(recipe(tmp_path, "llama-bias", quantize=section))
    assert result.path == tmp_path / "run" / "quantized"
    chosen = events(tmp_path / "run", "quantized")
    assert {event["storage"] for event in chosen} == {"pivoted:4:64"} and not any("loss" in event for event in chosen)
    model = lillama.load(result.path)
    assert {name for name, _ in factor_modules(model)} == set(result.plan.ranks)
    assert count_parameters(model) == result.plan.after
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    few = load_file(result.path / "model.safetensors")
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.bias"):
        assert torch.equal(kept[key], few[key]), "what few bits do not hold stays as it was"


def test_few_bits_can_be_added_and_begin_anew_where_the_weights_are_others(plain: Path, out: Path) -> None:
    layers = list((out / "layers").iterdir())
    dates = [file.stat().st_mtime_ns for file in layers]
    few = going_on(plain, out, quantize={"bits": 8})
    first = pipeline.compress(few)
    assert "quantized" in first.metrics and len(events(out, "quantise")) == 1
    assert [file.stat().st_mtime_ns for file in layers] == dates, "no layer learns again"
    old = weights_of(first.path)
    tuned = pipeline.compress(few.model_copy(update={"finetune": going_on(plain, out, finetune=TUNED).finetune}))
    assert len(events(out, "quantise")) == 2, "the result is that of the fine-tuned weights now"
    assert weights_of(tuned.path) != old
    measured = [e for e in events(out, "measured") if e["stage"] == "quantized"]
    assert len(measured) == 2, "and what was measured of the earlier one is no longer said of it"


@pytest.fixture(scope="module")
def whole(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(plain / "run", out)
    return weights_of(pipeline.compress(going_on(plain, out)).path)


@pytest.mark.parametrize("when", ["rounding", "saving", "saved"])
def test_a_run_that_dies_in_the_step_loses_nothing(when: str, whole: bytes, plain: Path, out: Path) -> None:
    def dies(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if when == "rounding":
            patch.setattr(stage, "quantise_ends_", dies)
        elif when == "saving":
            patch.setattr(stage, "write_json", dies)
        else:
            patch.setattr(RunDirectory, "event", lambda self, kind, **d: dies() if d.get("stage") == "quantized" else 0)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(going_on(plain, out))
    assert (out / "quantized").exists() == (when == "saved")
    (out / ".quantized.x1.part").mkdir()
    (out / ".quantized.x1.part" / "model.safetensors").write_bytes(b"0")
    dates = [path.stat().st_mtime_ns for path in sorted(out.glob("model/*"))]
    result = pipeline.compress(going_on(plain, out))
    assert weights_of(result.path) == whole and "quantized" in result.metrics
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("model/*"))] == dates
    assert not list(out.glob(".*.part"))
    assert cli.main(["verify", str(out)]) == 0


def test_a_damaged_result_is_made_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "home")
    out = tmp_path / "home" / "run"
    whole = weights_of(out / "quantized")
    (out / "quantized" / "model.safetensors").write_bytes(whole[:-7])
    recipe_file = tmp_path / "home" / "recipe.yaml"
    assert cli.main(["run", str(recipe_file), "--set", f"run.out={out}"]) == 0
    assert weights_of(out / "quantized") == whole
