"""Lillama compresses pretrained models by low-rank feature distillation (arXiv 2412.16719).

    import lillama
    lillama.compress(lillama.Recipe.load("recipes/quickstart.yaml"))
    model = lillama.load("runs/quickstart/model")

Importing it also teaches transformers to load and save the checkpoints, without importing torch here, and has a CPU's
kernels for their many shapes kept.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lillama._register import when_transformers_quantizers_load
from lillama.base.memory import keep_kernels
from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.hookspecs import hookimpl
from lillama.version import __version__

if TYPE_CHECKING:
    from lillama.checkpoint.load import load
    from lillama.checkpoint.quantizer import factorise_
    from lillama.recipe.schema import Recipe
    from lillama.run.pipeline import compress
    from lillama.run.prepare import make_plan

__all__ = [
    "Layer",
    "LillamaError",
    "Recipe",
    "Weight",
    "__version__",
    "compress",
    "factorise_",
    "hookimpl",
    "load",
    "make_plan",
]

_LAZY = {
    "Recipe": "lillama.recipe.schema",
    "compress": "lillama.run.pipeline",
    "factorise_": "lillama.checkpoint.quantizer",
    "load": "lillama.checkpoint.load",
    "make_plan": "lillama.run.prepare",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lillama' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


keep_kernels()
when_transformers_quantizers_load("lillama.checkpoint.quantizer")
