"""A standalone checkpoint loads with transformers where lillama cannot be imported, and computes the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_remote_code
import torch
from conftest import tiny, tokenizer
from safetensors.torch import load_file, save_file
from test_mixtral import tiny as tiny_mixtral
from transformers import AutoModelForCausalLM

import lillama
from lillama import LillamaError
from lillama.checkpoint.quantizer import factorise_
from lillama.checkpoint.standalone import export_standalone
from lillama.cli import main as cli
from lillama.run.pipeline import compress
from lillama.testing import recipe_for, token_batches

# In a process that can import neither lillama nor a plugin.
WITHOUT = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("lillama"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file
place, auto, given, out, again, options = sys.argv[1:]
options = json.loads(options)
auto = getattr(transformers, auto)
inputs = load_file(given)
for number, where in enumerate((place, again)):
    model, info = auto.from_pretrained(where, trust_remote_code=True, output_loading_info=True, **options)
    wrong = {key: list(value) for key, value in info.items() if value}
    assert not wrong, wrong
    with torch.no_grad():
        save_file({"logits": model.eval()(**inputs).logits.contiguous()}, f"{out}.{number}")
    if not number:
        model.save_pretrained(again)
if model.can_generate() and "input_ids" in inputs:
    model.generate(inputs["input_ids"][:, :4], max_new_tokens=2, do_sample=False)
own = "AutoConfig" in json.load(open(place + "/config.json"))["auto_map"]  # then nothing loads without it
try:
    auto.from_pretrained(place, **({"trust_remote_code": False} if own else {}))
except Exception as error:
    assert ("trust_remote_code" if own else "mismatch") in str(error).lower(), error
else:
    raise AssertionError("without the modelling file it loaded")
assert not any(name.partition(".")[0] == "lillama" for name in sys.modules)
"""


def check(model: Any, path: Path, target: Path, inputs: dict[str, torch.Tensor], auto: str, **options: str) -> None:
    """Export `path`, and compare what another process makes of it with what `model` computes."""
    export_standalone(path, target, trust_remote_code=True)
    said = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in said and said["auto_map"][auto].startswith("modeling_lillama.")
    assert "lillama" not in " ".join(
        line for line in (target / "modeling_lillama.py").read_text().splitlines() if "import" in line
    )
    save_file(inputs, target.with_suffix(".in"))
    out, again = target.with_suffix(".out"), target.with_suffix(".again")
    given = [str(target), auto, str(target.with_suffix(".in")), str(out), str(again), json.dumps(options)]
    cache = {"HF_MODULES_CACHE": str(target.with_suffix(".modules"))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *given], capture_output=True, text=True, env=os.environ | cache
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    for number in range(2):  # loaded, then saved by that process and loaded again
        assert torch.equal(load_file(f"{out}.{number}")["logits"], expected)
    names = set(load_file(path / "model.safetensors"))
    assert set(load_file(target / "model.safetensors")) == names == set(load_file(again / "model.safetensors"))


@pytest.mark.parametrize("storage", [pytest.param("factors", marks=pytest.mark.slow), "pivoted"])
def test_a_run_s_result_stands_alone(storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-bias").save_pretrained(tmp_path / "original")
    tokenizer().save_pretrained(tmp_path / "original")
    recipe = recipe_for(tmp_path / "original", tmp_path / "run", changes={"compress.storage": storage})
    path = compress(recipe, batches=token_batches(tiny("llama-bias"))).path
    check(lillama.load(path), path, tmp_path / "alone", token_batches(tiny("llama-bias"))[0], "AutoModelForCausalLM")
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "import lillama" not in card and "trust_remote_code=True" in card
    assert (tmp_path / "alone" / "tokenizer.json").exists()
    assert cli.main(["export", str(path), str(tmp_path / "verb"), "--standalone"]) == 0
    assert "trust_remote_code" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "verb")]) == 0


def linear(rank: int, storage: str, **more: str) -> dict[str, Any]:
    return {"kind": "linear", "storage": storage, "rank": rank, **more}


@pytest.mark.parametrize(("storage", "tied"), [("factors", False), ("pivoted", True)])
@pytest.mark.slow
def test_embeddings_and_heads_stand_alone(storage: str, tied: bool, tmp_path: Path) -> None:
    model = tiny("llama" if tied else "mistral")
    modules = {
        "model.embed_tokens": {"kind": "embedding", "storage": storage, "rank": 9},
        "lm_head": linear(9, storage, **({"tied": "model.embed_tokens"} if tied else {})),
        "model.layers.1.mlp.up_proj": linear(7, storage),
    }
    factorise_(model, modules)
    model.save_pretrained(tmp_path / "model")
    check(model, tmp_path / "model", tmp_path / "alone", token_batches(model)[0], "AutoModelForCausalLM")


@pytest.mark.parametrize("way", ["eager", pytest.param("grouped_mm", marks=pytest.mark.slow)])
def test_experts_stand_alone(way: str, tmp_path: Path) -> None:
    model = tiny_mixtral()
    experts = "model.layers.0.mlp.experts"
    modules = {
        f"{experts}.up": {"kind": "experts", "storage": "factors", "rank": 8},
        f"{experts}.down": {"kind": "experts", "storage": "pivoted", "rank": 8},
        "model.layers.1.self_attn.q_proj": linear(8, "pivoted"),
    }
    factorise_(model, modules)
    model.save_pretrained(tmp_path / "model")
    loaded = lillama.load(tmp_path / "model", experts_implementation=way)
    inputs = token_batches(model)[0]
    check(loaded, tmp_path / "model", tmp_path / "alone", inputs, "AutoModelForCausalLM", experts_implementation=way)


home = test_remote_code.home  # a fixture


@pytest.mark.slow
def test_a_model_with_code_of_its_own_stands_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "model", trust_remote_code=True)
    factorise_(model, {"model.layers.1.mlp.up_proj": linear(7, "pivoted")})
    model.save_pretrained(home / "small")
    assert cli.main(["export", str(home / "small"), str(home / "no"), "--standalone"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not (home / "no").exists()
    loaded = lillama.load(home / "small", trust_remote_code=True)
    check(loaded, home / "small", home / "alone", token_batches(tiny())[0], "AutoModelForCausalLM")


def test_what_cannot_stand_alone_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import GQA
    from transformers import GemmaConfig, GemmaForCausalLM

    gemma = GemmaForCausalLM(GemmaConfig(**GQA, head_dim=8)).eval()
    embedding = {"kind": "embedding", "storage": "factors", "rank": 9}
    factorise_(gemma, {"model.embed_tokens": embedding, "lm_head": linear(9, "factors", tied="model.embed_tokens")})
    gemma.save_pretrained(tmp_path / "gemma")
    assert cli.main(["export", str(tmp_path / "gemma"), str(tmp_path / "out"), "--standalone"]) == 2
    said = capsys.readouterr().err
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(LillamaError, match="holds no factors"):
        export_standalone(tmp_path / "plain", tmp_path / "out")
    assert "model.embed_tokens" in said and not (tmp_path / "out").exists()
