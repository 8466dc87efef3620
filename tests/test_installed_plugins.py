"""A plugin of somebody else's, installed with pip, serves; the environment narrows which do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
EXTERNAL = REPOSITORY / "tests" / "external"
DATA = {
    "model": {"id": "x"},
    "compress": {"reduction": 0.5},
    "calibration": {"dataset": "d"},
    "run": {"out": "o"},
}


def python(code: str, path: Path, *arguments: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "LILLAMA_PLUGINS"}
    places = [path, REPOSITORY, REPOSITORY / "plugins"]
    env |= {"PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the external plugin is installed in."""
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXTERNAL, source)
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


USE_PLUGIN = f"""
import json
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from lillama import Recipe, host
recipe = Recipe.parse({DATA!r}, ["plugin=neox"])
sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
plugin, layers = host.get().layers(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), recipe)
weights = [[w.name, list(w.shape), w.group] for w in layers[1].weights]
auto, _ = host.get().layers(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), Recipe.parse({DATA!r}))
other, _ = host.get().layers(LlamaForCausalLM(LlamaConfig(**sizes)), Recipe.parse({DATA!r}))
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
format = AUTO_QUANTIZER_MAPPING["lillama"].__module__
names = [layer.name for layer in layers]
print(json.dumps([str(plugin), plugin.hooks, names, weights, auto.name, other.name, format]))
"""


@pytest.mark.slow
def test_an_external_plugin_installed_with_pip(site: Path) -> None:
    plugin, hooks, names, weights, auto, other, quantizer = json.loads(python(USE_PLUGIN, site))
    assert plugin == "neox (lillama-neox-example 0.3.1)"
    assert hooks == ["enumerate_layers"]
    assert names == ["gpt_neox.embed_in", "gpt_neox.layers.0", "gpt_neox.layers.1"]
    block = "gpt_neox.layers.0"
    assert weights == [
        [f"{block}.attention.query_key_value", [24, 8], f"{block}.attention.query_key_value"],
        [f"{block}.attention.dense", [8, 8], f"{block}.attention.dense"],
        [f"{block}.mlp.dense_h_to_4h", [24, 8], f"{block}.mlp.dense_h_to_4h"],
        [f"{block}.mlp.dense_4h_to_h", [8, 24], f"{block}.mlp.dense_4h_to_h"],
    ]
    assert auto == "neox"
    assert other == "decoder"
    assert quantizer == "lillama.checkpoint.quantizer"  # known although transformers was imported first


def test_the_environment_narrows_installed_plugins(site: Path) -> None:
    code = "from lillama import host; print(list(host.get().plugins))"
    assert "'decoder'" in python(code, site)
    assert python(code, site, LILLAMA_PLUGINS="neox") == "['neox']"


RUN_RECIPE = """
import os, pathlib, runpy, sys
source, folder = sys.argv[1:]
os.chdir(folder)
runpy.run_path(f"{source}/make_tiny.py", run_name="__main__")
from lillama.cli.main import main
raise SystemExit(main(["run", f"{source}/recipe.yaml"]))
"""


@pytest.mark.slow
def test_a_recipe_runs_through_it(site: Path, tmp_path: Path) -> None:
    said = python(RUN_RECIPE, site, str(EXTERNAL), str(tmp_path))
    assert "GPTNeoXForCausalLM, plugin neox (lillama-neox-example 0.3.1)" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["parameters"]["after"] <= 0.81 * metrics["parameters"]["before"]
    assert metrics["after"]["perplexity/perplexity"] < 1.05 * metrics["before"]["perplexity/perplexity"]
