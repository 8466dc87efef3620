"""The numbers of a run that estimates rest on, counted once."""

from __future__ import annotations

from dataclasses import dataclass

from lillama.base.device import Device
from lillama.contract import Layer
from lillama.factorise.start import find_needs
from lillama.lowrank.counts import stored
from lillama.plan.plan import Plan, wants_spectra
from lillama.pretrained.source import Source
from lillama.recipe.schema import Recipe


@dataclass
class Counts:
    """What every part of an estimate looks at, counted once. Numbers are of a layer, by its name."""

    source: Source
    plan: Plan
    recipe: Recipe
    device: Device

    def __post_init__(self) -> None:
        plan, recipe, text = self.plan, self.recipe, self.source.config.get_text_config()
        self.layers = plan.work
        self.planned = [layer for layer in plan.work if plan.changes(layer)]
        widest = max((w.shape[1] for layer in plan.work for w in layer.weights), default=0)
        self.width: int = getattr(text, "hidden_size", widest)
        self.batch = recipe.distill.batch_size * recipe.calibration.sequence_length  # tokens
        self.streams, self.grams, self.fisher = find_needs(recipe)
        self.numbers = {layer.name: _numbers(self.source, layer.name) for layer in plan.work}
        self.factors = {
            layer.name: sum(stored(w, plan.ranks[w.name], "factors") for w in plan.planned(layer))
            for layer in self.planned
        }
        self.rest = {layer.name: self.numbers[layer.name] - _replaced(plan, layer) for layer in self.planned}
        whole = recipe.distill.train != "factors"
        self.trained = {name: count + (self.rest[name] if whole else 0) for name, count in self.factors.items()}
        # Of a finished layer, as it is stored.
        self.kept = {
            layer.name: sum(stored(w, plan.ranks[w.name], plan.storage) for w in plan.planned(layer))
            + (self.rest[layer.name] if whole else 0)
            for layer in self.planned
        }
        # Of a layer's experts, a token passes through a few.
        self.chosen: int = getattr(text, "num_experts_per_tok", None) or 1
        self.vocabulary = int(getattr(text, "vocab_size", None) or 0)

    @property
    def sequential(self) -> bool:
        """Whether layers learn one by one."""
        return self.recipe.distill.schedule == "sequential"

    @property
    def measured(self) -> bool:
        """Whether the predictions' sensitivity is measured before anything is distilled."""
        return wants_spectra(self.recipe.compress) or bool(self.fisher)

    @property
    def narrows(self) -> bool:
        """Whether neurons of MLPs may go, so that it is measured what each is worth."""
        return self.recipe.compress.neurons is not None

    @property
    def foretold(self) -> bool:
        """Whether what few bits would cost is measured with it."""
        return self.plan.budget is not None and self.recipe.quantize is not None


def _numbers(source: Source, name: str) -> int:
    return sum(p.numel() for p in source.model.get_submodule(name).parameters())


def _replaced(plan: Plan, layer: Layer) -> int:
    return sum(w.shape[0] * w.shape[1] * w.copies for w in plan.planned(layer))  # a tied one's too
