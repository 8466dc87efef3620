"""The checkpoint format is known to transformers whichever of the two is imported first, at no cost till then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REGISTRY = "import transformers.quantizers.auto"
# A stand-in for transformers is quick to import; lillama's own quantizer would need the real one.
START = """
import sys, types
sys.modules["lillama.checkpoint.quantizer"] = types.ModuleType("lillama.checkpoint.quantizer")
"""
END = """
from lillama._register import _AfterImport
auto = sys.modules["transformers.quantizers.auto"]
print(any(isinstance(finder, _AfterImport) for finder in sys.meta_path), auto.__spec__.loader.__module__)
"""


def wait(module: str) -> str:
    return f"from lillama._register import when_transformers_quantizers_load as wait; wait('{module}')"


def python(code: str, path: Path) -> list[str]:
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A stand-in for transformers, and modules that need it and say that they were imported."""
    quantizers = tmp_path / "transformers" / "quantizers"
    quantizers.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (quantizers / "__init__.py").write_text("from .auto import register_quantizer\n")
    (quantizers / "auto.py").write_text("from lillama import hookimpl\nregister_quantizer = print\n")
    for name in ("probe_one", "probe_two"):
        (tmp_path / f"{name}.py").write_text(
            f"from transformers.quantizers.auto import register_quantizer\nregister_quantizer('{name}')\n"
        )
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')")
    return tmp_path


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        ([wait("probe_one"), "print('lillama')", REGISTRY], ["lillama", "probe_one"]),
        ([REGISTRY, "print('transformers')", wait("probe_one")], ["transformers", "probe_one"]),
        ([wait("probe_one"), wait("probe_one"), REGISTRY, wait("probe_one")], ["probe_one"]),
        ([wait("probe_one"), wait("probe_two"), REGISTRY], ["probe_one", "probe_two"]),
        (
            [
                wait("probe_one"),
                "import importlib.util",
                "assert importlib.util.find_spec('transformers.quantizers.auto')",
                "print('found')",
                REGISTRY,
            ],
            ["probe_one", "found"],  # looking it up imports its package
        ),
        ([wait("probe_one"), "import probe_one"], ["probe_one"]),
        ([wait("probe_one"), "import transformers.quantizers", "print('done')"], ["probe_one", "done"]),
    ],
    ids=[
        "lillama first",
        "transformers first",
        "twice",
        "two modules",
        "looked up before",
        "imported directly",
        "package",
    ],
)
def test_a_module_waits_for_transformers(modules: Path, lines: list[str], printed: list[str]) -> None:
    out = python("\n".join([START, *lines, END]), modules)
    assert out == [*printed, "False _frozen_importlib_external"]


def test_a_waiting_module_that_fails_is_not_lost(modules: Path) -> None:
    code = f"""{START}
{wait("broken")}
for _ in range(2):
    try:
        {REGISTRY}
    except RuntimeError as error:
        print(error)
"""
    assert python(code, modules) == ["broken", "broken"]


def test_importing_lillama_imports_nothing_heavy_and_lists_its_names(tmp_path: Path) -> None:
    code = """
import sys, lillama
print(sorted({"torch", "transformers", "datasets", "pydantic"} & set(sys.modules)))
print(set(lillama.__all__) <= set(dir(lillama)), lillama.Recipe.__name__)
try:
    lillama.nothing
except AttributeError as error:
    print(error)
"""
    assert python(code, tmp_path) == ["[]", "True Recipe", "module 'lillama' has no attribute 'nothing'"]


@pytest.mark.slow
def test_the_real_transformers_loads_after_lillama(tmp_path: Path) -> None:
    code = """
import lillama
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["lillama"].__module__)
"""
    assert python(code, tmp_path) == ["lillama.checkpoint.quantizer"]
