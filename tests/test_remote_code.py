"""A model that comes with its own code: compressed, loaded, measured and trained, and never run without a word."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer

import lillama
from lillama import LillamaError, hookimpl, host, registry
from lillama.cli import main as cli
from lillama.contract import Layer
from lillama.host import Host

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELLING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


class Own:
    """A plugin for it."""

    @hookimpl
    def enumerate_layers(self, model: Any) -> list[Layer] | None:
        if model.config.model_type != "own":
            return None
        return [Layer.of_linears(model, f"model.layers.{i}", GROUPS) for i in range(model.config.num_hidden_layers)]


class Point:
    """Its entry point."""

    name, dist = "own", None
    load = staticmethod(Own)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A directory with the model, a text and a recipe."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's cache
    found = Host([Point])
    monkeypatch.setattr(host, "get", lambda: found)
    registry.discover_again()
    directory = tmp_path / "model"
    tiny("mistral").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    (directory / "configuration_own.py").write_text(CONFIGURATION)
    (directory / "modeling_own.py").write_text(MODELLING)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran . " * 60)
    (tmp_path / "recipe.yaml").write_text(f"""
model: {{id: {directory}, dtype: float32, trust_remote_code: true}}
compress: {{reduction: 0.1, of: weights, rank_multiple: 2, strategy: uniform, init: svd}}
distill: {{epochs: 0}}
calibration: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 256}}
finetune: {{steps: 2, batch_size: 2, sequence_length: 16, teacher: 0.5}}
evaluate: {{perplexity: {{dataset: {tmp_path}/text.txt, sequence_length: 16, tokens: 64}}}}
run: {{out: {tmp_path}/out, device: cpu, compute: float32}}
""")
    yield tmp_path
    registry.discover_again()


def test_a_model_with_code_of_its_own_goes_all_the_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(home / "recipe.yaml")]) == 0, capsys.readouterr().err
    for place in (home / "out" / "model", home / "out" / "finetuned"):
        model = lillama.load(place, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM" and type(model).__module__.startswith("transformers_modules")
        assert model(torch.arange(4)[None]).logits.isfinite().all()
        with pytest.raises(LillamaError, match="no model class 'OwnForCausalLM'") as caught:
            lillama.load(place)
        assert "trust_remote_code=True" in str(caught.value.hint)
    capsys.readouterr()
    trusted = ["--set", "model.trust_remote_code=true"]
    assert cli.main(["eval", str(home / "out"), "--json", *trusted]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    stored = json.loads((home / "out" / "metrics.json").read_text())["finetuned"]
    assert found["perplexity/perplexity"] == pytest.approx(stored["perplexity/perplexity"])


def test_no_directory_makes_its_own_code_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = home / "ran"
    for file in ("configuration_own.py", "modeling_own.py"):
        with (home / "model" / file).open("a") as code:
            code.write(f"\nPath = __import__('pathlib').Path\nPath({str(ran)!r}).touch()\n")
    recipe = (home / "recipe.yaml").read_text().replace("trust_remote_code: true", "trust_remote_code: false")
    (home / "careful.yaml").write_text(recipe)
    assert cli.main(["run", str(home / "careful.yaml")]) == 2
    perplexity = f"evaluate.perplexity={{dataset: {home}/text.txt, sequence_length: 16, tokens: 64}}"
    assert cli.main(["eval", str(home / "model"), "--set", perplexity]) == 2
    assert "model.trust_remote_code: true says so" in capsys.readouterr().err
    # A run directory that asks for trust itself, in the recipe it holds, gets none.
    strangers = home / "strangers"
    shutil.copytree(home / "model", strangers / "model")
    (strangers / "recipe.resolved.yaml").write_text((home / "recipe.yaml").read_text())
    assert "trust_remote_code: true" in (strangers / "recipe.resolved.yaml").read_text()
    assert cli.main(["eval", str(strangers)]) == 2
    assert cli.main(["bench", str(strangers), "--lengths", "4", "--new-tokens", "2"]) == 2
    assert not ran.exists()
    assert cli.main(["eval", str(home / "model"), "--set", perplexity, "--set", "model.trust_remote_code=true"]) == 0
    assert ran.exists()
