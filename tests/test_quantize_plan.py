"""Few bits planned: bytes, estimates, what is refused beforehand, sweeps; and what learns after rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from rich.console import Console
from safetensors.torch import load_file
from test_quantize_run import logits, own_cache, recipe, settings, weights_of

import lillama
from lillama import registry
from lillama.cli import main as cli
from lillama.cli import show
from lillama.errors import LillamaError
from lillama.lowrank.factors import FactorStorage
from lillama.recipe.schema import Recipe
from lillama.run import fewbits, pipeline, prepare, sweep, sweeptable
from lillama.run.estimate import estimate

__all__ = ["own_cache"]  # a fixture that every test here uses


class Stacked(FactorStorage):
    """Factors with a tensor that is no matrix."""

    parameters = ("A", "B", "s")

    def shapes(self, d_out, d_in, rank):
        return {**super().shapes(d_out, d_in, rank), "s": (rank,)}


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    given = settings(tmp_path)
    found = prepare.prepare(Recipe.parse(given))
    dense = found.plan.keep_dense(dict.fromkeys(found.plan.ranks, "for once"))

    def refused(plan: Any, **section: Any) -> LillamaError:
        with pytest.raises(LillamaError) as caught:
            fewbits.check_quantize(Recipe.parse(given | {"quantize": section}), plan, found.source.model)
        return caught.value

    assert refused(dense, what="factors").where == "quantize.what"
    fewbits.check_quantize(Recipe.parse(given | {"quantize": {"what": "linears"}}), dense, found.source.model)
    odd = replace(found.plan, ranks=dict.fromkeys(found.plan.ranks, 3), storage="factors")
    assert refused(odd, what="factors", bits=4).where == "quantize.bits"  # A has three columns
    fewbits.check_quantize(Recipe.parse(given | {"quantize": {"bits": 8}}), odd, found.source.model)
    monkeypatch.setattr(registry.STORAGES, "_targets", dict(registry.STORAGES._targets))
    registry.Registries.storages.add("stacked", Stacked)
    own = Recipe.parse(given, ["compress.storage=stacked"])
    with pytest.raises(LillamaError, match="'stacked' cannot be kept in few bits: its tensor 's' is no matrix"):
        prepare.prepare(own)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_how_many_bytes_are_left(tmp_path: Path) -> None:
    for name, section in (
        ("llama", {"bits": 4, "what": "all", "storage": "keep"}),
        ("llama-bias", {"bits": 8, "what": "linears", "storage": "keep"}),
        ("llama-bias", {"bits": 4, "what": "factors", "method": "nearest", "group_size": 128}),
    ):
        home = tmp_path / f"{name}-{section['what']}"
        home.mkdir()
        given = recipe(home, name, quantize=section, evaluate={})
        prepared = prepare.prepare(given)
        assert given.quantize is not None
        told = fewbits.checkpoint_bytes(given.quantize, prepared.plan, prepared.source.model, 4)
        result = pipeline.compress(given)
        tensors = load_file(result.path / "model.safetensors")
        assert told == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        console = Console(width=200)
        with console.capture() as said:
            console.print(show.plan(prepared))
        assert f"quantize {section['what']} to {section['bits']} bits" in said.get()
        assert f"{told / 1024:.0f} KiB" in said.get()


def test_estimates_count_the_step(tmp_path: Path) -> None:
    """Its moments and its model in float32 are memory, its checkpoint is disk, and the form that auto may take, too."""
    found = {}
    for key, section in (("none", None), ("keep", {"bits": 4, "storage": "keep"}), ("auto", {"bits": 4})):
        prepared = prepare.prepare(recipe(tmp_path, quantize=section))
        found[key] = estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device)
        if section:
            parts = (prepared.recipe.quantize, prepared.plan, prepared.source.model)
            often, held = fewbits.moments_bytes(*parts)
            # q, k, v, o, gate, up, down of three layers, and once more the largest while it is divided.
            squares = 3 * (2 * (32**2 + 32**2) + 2 * (16**2 + 32**2) + 3 * (48**2 + 32**2)) + 48**2 + 32**2
            assert (often, held) == (1, 4 * squares)
    assert found["none"].disk <= found["keep"].disk <= found["auto"].disk
    assert found["none"].seconds < found["keep"].seconds < found["auto"].seconds


@pytest.mark.slow
def test_a_sweep_tables_what_is_left_and_removes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings(tmp_path)))
    spec = {"base": "base.yaml", "axes": {"quantize.bits": [4, 8]}, "out": str(tmp_path / "out"), "keep": False}
    (tmp_path / "sweep.yaml").write_text(json.dumps(spec))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    sizes = [row["metrics"]["bytes"]["quantized"] for row in rows]
    assert sizes[0] < sizes[1]
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "weights MiB" in table
    assert not list((tmp_path / "out").glob("*/quantized")) and "quantized" in sweep.HEAVY
    assert sweeptable.last_stage(rows[0]["metrics"]) == "quantized"


@pytest.mark.slow
def test_scales_learn_around_the_rounding_and_codes_stay(tmp_path):
    """Of the same codes, what learned predicts nearer to the original; norms learn as well, weights do not."""
    section = {"bits": 4, "what": "factors", "method": "nearest"}
    learned = {**section, "steps": 8, "learning_rate": 1e-4}
    changes = {"finetune": {"sequence_length": 16, "batch_size": 4, "tokens": 256, "steps": 1, "learning_rate": 1e-9}}
    plain = pipeline.compress(recipe(tmp_path, quantize=section, **changes))
    out = {"out": str(tmp_path / "learned"), "device": "cpu", "compute": "float32"}
    taught = pipeline.compress(recipe(tmp_path, quantize=learned, run=out, **changes))
    before, after = (load_file(one.path / "model.safetensors") for one in (plain, taught))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and all(name.endswith("_scale") or "norm" in name for name in moved)
    assert any(name.endswith("_scale") for name in moved)
    assert not (tmp_path / "learned" / "finetune").exists(), "the trainer's own files go"

    original = logits(tiny("llama")).log_softmax(-1)
    apart = [
        float((original.exp() * (original - logits(lillama.load(one.path)).log_softmax(-1))).sum(-1).mean())
        for one in (plain, taught)
    ]
    assert apart[1] < apart[0]
    again = pipeline.compress(recipe(tmp_path, quantize=learned, run=out, **changes))
    assert weights_of(again.path) == weights_of(taught.path)
