"""Models whose files name tensors otherwise than their modules do, or hold several in one: through a run and back."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lillama import Layer, hookimpl, host, registry
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.pretrained.headers import index_of, open_files
from lillama.run import pipeline, prepare
from lillama.testing import full_rank_plan, recipe_for, token_batches

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from reaching import build, classes


def small(name: str, directory: Path) -> Any:
    one = next(one for one in classes.listed() if one.name == name)
    model = build.build(one.find()[0], one.configuration())
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", ["NomicBertForMaskedLM", "GteForMaskedLM", "DeepseekV4ForCausalLM"])
def test_every_parameter_is_found_in_the_files(name: str, tmp_path: Path) -> None:
    """Those that a fused tensor is split into, and such as a renaming of others happens to match."""
    model = small(name, tmp_path)
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)
    index = index_of(skeleton, open_files(tmp_path), tmp_path)
    assert {key for key, _ in skeleton.named_parameters()} <= index.keys()


class AnyLinear:
    """A plugin for one class: all linears of its blocks, each by itself."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks

    @hookimpl
    def auto_class(self, config: Any) -> Any:
        model_class = getattr(transformers, config.architectures[0])
        return SimpleNamespace(
            from_config=lambda config, dtype, trust_remote_code: model_class._from_config(config, dtype=dtype),
            from_pretrained=model_class.from_pretrained,
            __name__="AutoModelForCausalLM",
        )

    @hookimpl
    def enumerate_layers(self, model: Any) -> list[Layer]:
        layers = []
        for number, block in enumerate(model.get_submodule(self.blocks)):
            linears = [[name] for name, module in block.named_modules() if type(module) is torch.nn.Linear]
            layers.append(Layer.of_linears(model, f"{self.blocks}.{number}", linears))
        return layers


@pytest.mark.parametrize(
    ("name", "blocks", "skip"),
    [
        ("NomicBertForMaskedLM", "nomic_bert.layers", ["*.q_proj"]),  # one of three that the files hold as one
        ("NomicBertForMaskedLM", "nomic_bert.layers", ["*.1.*"]),
        ("LagunaForCausalLM", "model.layers", []),  # a renaming that matches what it makes
    ],
)
def test_full_rank_gives_the_original(
    name: str, blocks: str, skip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(name, tmp_path / "model")
    point = SimpleNamespace(name="any", dist=None, load=lambda: AnyLinear(blocks))
    list(registry.STRATEGIES)  # the registries are filled by the plugins that are installed
    hosts = host.Host([point])
    monkeypatch.setattr(host, "get", lambda: hosts)
    changes = {"compress.init": "svd", "distill.epochs": 0, "compress.skip": skip}
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run", changes=changes))
    plan = full_rank_plan(prepared.layers, prepared.source.parameters, "factors")
    kept = {weight: rank for weight, rank in plan.ranks.items() if weight in prepared.plan.ranks}
    assert kept and (len(kept) < len(plan.ranks)) == bool(skip)
    prepared = replace(prepared, plan=replace(plan, ranks=kept))
    batches = token_batches(model)
    result = pipeline.Run(prepared, Progress(), batches=batches).execute()
    loaded = load(result.path).eval()
    torch.testing.assert_close(build.run(loaded, batches[0]), build.run(model, batches[0]), rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(build.run(load(tmp_path / "again").eval(), batches[0]), build.run(loaded, batches[0]))
