"""Weights that had a rank and are kept dense after all: decided while a run works, remembered in files of their own.

Each decision is a file that is written once (`dense/0003-model.layers.3.0.json`: weight and reason), before anything
depends on it. So a run that is stopped at any time goes on with the plan it had.
"""

from __future__ import annotations

from lillama.base.rundir import RunDirectory
from lillama.contract import Layer
from lillama.plan.plan import Plan

FOLDER = "dense"


def next_file(plan: Plan, layer: Layer, directory: RunDirectory) -> str:
    """Where the next decision about weights of `layer` is kept."""
    stem, number = f"{FOLDER}/{plan.layers.index(layer):04d}-{layer.name}", 0
    while directory.has(f"{stem}.{number}.json"):
        number += 1
    return f"{stem}.{number}.json"


def apply(plan: Plan, directory: RunDirectory) -> Plan:
    """The plan as it is after the decisions that a run directory holds."""
    decided: dict[str, str] = {}
    for i, layer in enumerate(plan.layers):
        number = 0
        while directory.has(name := f"{FOLDER}/{i:04d}-{layer.name}.{number}.json"):
            decided |= directory.json(name)
            number += 1
    return plan.keep_dense(decided) if decided else plan
