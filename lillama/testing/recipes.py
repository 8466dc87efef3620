"""Recipes and plans for tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.plan.plan import Plan
from lillama.recipe.schema import Recipe
from lillama.run import prepare

REDUCTIONS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.002)  # shares of a tiny model that might be removed
MULTIPLES = (None, 2, 1)  # of ranks, None being the default: matrices may be too small for it


def recipe_for(model: Path, out: Path, plugin: str = "auto", changes: dict[str, Any] | None = None) -> Recipe:
    """A small recipe for a local model; `changes` maps dotted keys to values."""
    settings: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "plugin": plugin,
        "compress": {
            "reduction": 0.1,
            "of": "weights",
            "rank_multiple": 2,
            "strategy": "uniform",
            "init": "whitened",
            "storage": "factors",
        },
        "distill": {
            "loss": "teacher+student",
            "objective": "l1_logcos",
            "train": "factors",
            "batch_size": 2,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "warmup": 0.0,
            "clip_norm": None,
            "holdout": 0.3,
        },
        "calibration": {"dataset": "given"},
        "run": {"out": str(out), "device": "cpu", "compute": "float32"},
    }
    settings = copy.deepcopy(settings)
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    return Recipe.parse(settings)


def default_recipe(
    model: Path, out: Path, plugin: str, device: str = "auto", neurons: float | None = None
) -> prepare.Prepared:
    """A model prepared by a recipe of defaults alone, the first of some shares removed that leave it room.

    With `neurons`, that share of them may be removed, in float32 as everything else is that is counted on afterwards.

    A model whose matrices are too small for the default ranks, multiples of 8, gets finer ones. Raises LillamaError
    where even so nothing can be removed.
    """
    for multiple in MULTIPLES:
        for reduction in REDUCTIONS:
            finer: dict[str, Any] = {} if multiple is None else {"rank_multiple": multiple}
            finer |= {} if neurons is None else {"neurons": neurons}
            settings: dict[str, Any] = {
                "model": {"id": str(model)},
                "plugin": plugin,
                "compress": {"reduction": reduction, **finer},
                "calibration": {"dataset": "given"},
                "run": {"out": str(out), "device": device},
            }
            if neurons is not None:
                settings["model"]["dtype"] = settings["run"]["compute"] = "float32"
            try:
                return prepare.prepare(Recipe.parse(settings))
            except LillamaError as error:
                if not str(error.where).startswith("compress.reduction"):
                    raise
                last = error
    raise last


def full_rank_plan(layers: list[Layer], before: int, storage: str) -> Plan:
    """Every weight at the largest rank its storage can hold it exactly."""
    ranks = {w.name: min(w.shape) for layer in layers for w in layer.weights}
    return Plan(tuple(layers), ranks, storage, before)
