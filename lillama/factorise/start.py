"""Starting factors of a layer's weights, by the recipe's initialiser."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lillama import registry
from lillama.base.device import factorising
from lillama.contract import Layer, Weight, relative
from lillama.factorise import embedding
from lillama.factorise.grams import GRAMS, Found
from lillama.lowrank import swap as factors
from lillama.plan.plan import Plan
from lillama.recipe.schema import Recipe


def needs(recipe: Recipe) -> tuple[set[str], frozenset[str]]:
    """Which streams the recipe's loss runs on ("teacher", "student"), and which Grams its init names (see grams)."""
    loss = inspect.signature(registry.LOSSES.get(recipe.distill.loss)).parameters
    init = inspect.signature(registry.INITIALISERS.get(recipe.compress.init)).parameters
    return {name.removeprefix("on_") for name in loss}, GRAMS & init.keys()


def fisher_factors(recipe: Recipe) -> frozenset[str]:
    """Which factors of the Fisher information the recipe's init names (see sensitivity)."""
    init = inspect.signature(registry.INITIALISERS.get(recipe.compress.init)).parameters
    return frozenset(("input_fisher", "output_fisher")) & init.keys()


def initial_factors(
    layer: Layer,
    teacher: nn.Module,
    plan: Plan,
    recipe: Recipe,
    grams: Found | None,
    weights: Iterable[Weight] | None = None,
) -> dict[str, Tensor]:
    """The starting factors of a layer's planned weights, or of `weights`: `<weight>.A`, `<weight>.B` in float32.

    Those of stacked weights have one more dimension, in front.
    """
    initialise = registry.INITIALISERS.get(recipe.compress.init)
    wanted = inspect.signature(initialise).parameters
    found = {}
    for weight in plan.planned(layer) if weights is None else weights:
        if weight.tied:
            continue
        W = factors.dense(teacher, relative(weight, layer), weight.kind)
        home, place = W.device, factorising(W.device)
        W = W.to(place)
        given = {name: one.to(place) for name, one in (grams[weight.name] if grams is not None else {}).items()}
        arguments: dict[str, Any] = {}
        if "generator" in wanted:
            # Seeded by name, so that neither the schedule nor a resume changes what is drawn.
            digest = hashlib.sha256(f"{recipe.run.seed}/{weight.name}".encode()).digest()
            arguments["generator"] = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rank = plan.ranks[weight.name]
        if weight.kind == "experts":
            each = [
                [f.float() for f in initialise(one, rank, **arguments, **{k: gram[i] for k, gram in given.items()})]
                for i, one in enumerate(W)
            ]
            A, B = (torch.stack(one) for one in zip(*each))
        elif weight.kind == "embedding":
            A, B = embedding.factorise(initialise, wanted, W, rank, arguments, **given)
        else:
            A, B = initialise(W, rank, **arguments, **given)
        found[f"{weight.name}.A"], found[f"{weight.name}.B"] = A.float().to(home), B.float().to(home)
    return found
