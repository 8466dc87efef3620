"""benchmarks/reach.py: small models of any class, what is found of one, and the page of what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import reach  # noqa: E402
from reaching import build, causes, classes, page, shrink, watch  # noqa: E402

# A decoder, one of two kinds of layers, experts, one that hands a bias on, a picture's encoder, one of sound.
SIX = (
    "LlamaForCausalLM",
    "Qwen3NextForCausalLM",
    "DeepseekV3ForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
)


def named(name: str) -> classes.Class:
    return next(one for one in classes.listed() if one.name == name)


@pytest.mark.parametrize("name", SIX)
def test_a_class_is_built_small_and_runs(name: str) -> None:
    one = named(name)
    model = build.build(one.find()[0], one.configuration())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    inputs = build.find_inputs(model)
    first, second = build.run(model, inputs), build.run(build.build(one.find()[0], one.configuration()), inputs)
    assert first.isfinite().all()
    assert torch.equal(first, second), "the same seed gives another model"
    other = build.batches(model, inputs, 1)[0]
    assert not torch.equal(build.run(model, other), first), "the outputs do not depend on the inputs"


def test_a_class_of_two_mappings_is_of_the_first_kind() -> None:
    every = classes.listed()
    assert len({one.name for one in every}) == len(every)
    apart = [one for kind in classes.KINDS for one in classes.listed((kind,))]
    assert apart == sorted(every, key=lambda one: classes.KINDS.index(one.kind))
    assert named("XLMWithLMHeadModel").kind == "clm"


def test_a_small_model_has_every_kind_of_layer() -> None:
    from transformers import Gemma3TextConfig, Qwen3NextConfig, Zamba2Config

    for config_class in (Gemma3TextConfig, Qwen3NextConfig):
        small = shrink.shrink(config_class)
        assert set(small.layer_types) == set(config_class().layer_types)
        assert len(small.layer_types) == small.num_hidden_layers <= 4
    assert "hybrid" in shrink.shrink(Zamba2Config).layers_block_type


def test_blocks_that_are_driven_otherwise_are_noticed() -> None:
    """The verdict on streams is not empty: a position bias that is left out shows."""
    one = named("T5ForConditionalGeneration")
    model = build.build(one.find()[0], one.configuration())
    inputs = build.find_inputs(model)
    names = [f"decoder.block.{i}" for i in range(2)]
    streams = watch.Streams(model, names, inputs)
    with streams.of(model):
        build.run(model, inputs)
    assert streams.verdict() == "yes"
    again = watch.Streams(model, names, inputs)
    with again.of(model):
        hidden = torch.randn(2, build.TEXT.length, model.config.d_model)
        for name in names:
            model.get_submodule(name)(hidden)
    assert "decoder.block.0 differs by" in again.verdict()


@pytest.mark.slow
def test_what_is_found_is_kept_and_a_class_is_not_measured_twice(tmp_path: Path) -> None:
    out, target = tmp_path / "reach.jsonl", tmp_path / "reach.md"
    given = ["--out", str(out), "--only", "LlamaForCausalLM", "--page", str(target)]
    done = subprocess.run([sys.executable, BENCHMARKS / "reach.py", *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clm LlamaForCausalLM 100% works" in done.stdout
    (found,) = map(json.loads, out.read_text().splitlines())
    assert (found["plugin"], found["coverage"]) == ("decoder", 1.0)
    assert found["blocks"] == ["model.layers.0", "model.layers.1"]
    assert [found[stage] for stage in ("full", "default", "streams")] == ["yes"] * 3
    assert "| LlamaForCausalLM | decoder | yes | 100% | 100% |" in target.read_text()
    options = reach.parsed(given)
    assert not any(reach.chosen(one, options, reach.read(out)) for one in classes.listed())
    assert any(reach.chosen(one, options, {}) for one in classes.listed())


def finding(name: str, **others: Any) -> dict[str, Any]:
    stages = dict.fromkeys(("builds", "forward", "reloads", "plan", "full", "default", "streams"), "yes")
    shares = {"plugin": "decoder", "coverage": 1.0, "of_model": 0.5}
    return {"kind": "clm", "model_type": name.lower(), "class": name, **stages, **shares, **others}


def test_the_page_counts_what_was_measured(tmp_path: Path) -> None:
    findings = [
        finding("Whole"),
        finding("Half", coverage=0.4, left={"Experts.gate_up_proj": 9}),
        finding("Wrong", streams="model.layers.0 differs by 2.0e-02"),
        finding("Refused", default="the plugin | cannot"),
        finding("Unbuilt", builds="ImportError: timm", forward="ImportError: timm"),
    ]
    page.write(findings, tmp_path / "reach.md")
    text = (tmp_path / "reach.md").read_text()
    assert "| Causal language models | 5 | 4 | 2 (50%) | 1 (25%) |" in text
    assert "| Half | decoder | yes | 40% | 50% | Experts.gate_up_proj |" in text
    assert "| Wrong | decoder | no | 100% | 50% | stream: model.layers.0 differs by 2.0e-02 |" in text
    assert "| Refused | decoder | no | 100% | 50% | the plugin \\| cannot |" in text
    assert "| Unbuilt | decoder | does not run |" in text


def test_what_failed_alike_is_told_together() -> None:
    told = causes.grouped(
        [
            finding("One", default="model.layers.3.q: the module is never called", traces={"default": ["kfac.py:155"]}),
            finding("Two", default="decoder.block.11.k: the module is never called"),
            finding("Three", full="differs by 2.0e-02"),
        ]
    )
    assert "default: #: the module is never called (2)\n    One, Two\n" in told
    assert "kfac.py:155" in told and "full: differs by # (1)" in told
