"""What a run does before it writes anything: the model is opened, asked for its layers, and planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM

from lillama import host
from lillama.base import device
from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.factorise import refit
from lillama.lowrank import swap
from lillama.plan.budget import Measured
from lillama.plan.neurons import choose_neurons
from lillama.plan.plan import Plan, choose_ranks
from lillama.plan.within import choose_within
from lillama.pretrained import locate
from lillama.pretrained.ends import with_ends
from lillama.pretrained.source import Source, weights_dtype
from lillama.recipe.schema import Recipe
from lillama.run import check, fewbits


@dataclass
class Prepared:
    """An opened model with its plan; nothing was written yet."""

    recipe: Recipe
    source: Source
    plugin: host.Plugin
    layers: list[Layer]
    plan: Plan
    device: device.Device


def prepare(recipe: Recipe, config: Any = None) -> Prepared:
    """Open the recipe's model on the meta device and plan its ranks.

    `config` is used in place of the model's own (planning for a model that is not at hand).
    """
    chosen = device.choose(recipe.run.device, recipe.run.compute)
    chosen.activate()
    hosts, source = host.get(), open_source(recipe, chosen, config)
    plugin, layers = hosts.layers(source.model, recipe)
    if recipe.compress.embedding and not any(layer.kind != "block" for layer in layers):
        layers = with_ends(source.model, layers)
    source.share(hosts.shared_modules(plugin, source.model, recipe))
    if not any(layer.weights for layer in layers):
        raise LillamaError(f"the plugin {plugin} offers no weights of this model", where="plugin")
    check.check_writer(recipe, source)
    check.check_learned_text(recipe)
    check.check_lengths(recipe, source.config)
    check.check_skip(recipe.compress.skip, layers, source.model)
    if config is None:  # where the model is not at hand, the data need not be
        check.check_data(recipe)
    plan = _plan(recipe, layers, source)
    refit.check_refits(plan, recipe)
    check.check_initialiser(recipe, plan)
    check.check_neurons(recipe, layers)
    fewbits.check_quantize(recipe, plan, source.model)
    _check_layers(layers, source)
    return Prepared(recipe, source, plugin, layers, plan, chosen)


def settle(plan: Plan, recipe: Recipe, layers: list[Layer], measured: Measured) -> Plan:
    """The plan that a provisional one becomes, once it was `measured` what ranks depend on."""
    if plan.budget is not None:
        return choose_within(layers, plan.before, recipe.compress, plan.budget, measured)
    if recipe.compress.neurons is not None:
        layers, measured = choose_neurons(layers, plan.before, recipe.compress, measured)
    return choose_ranks(layers, plan.before, recipe.compress, measured.spectra)


def _plan(recipe: Recipe, layers: list[Layer], source: Source) -> Plan:
    """The recipe's ranks, and bits where both share one budget; provisional where they wait to be measured."""
    if recipe.compress.size is None:
        return choose_ranks(layers, source.parameters, recipe.compress)
    # Counted once, while what is tied is one: the budget goes with the plan.
    budget = fewbits.budget_of(recipe, layers, source)
    return choose_within(layers, source.parameters, recipe.compress, budget)


def open_source(recipe: Recipe, chosen: device.Device | None = None, config: Any = None) -> Source:
    """The recipe's model, its weights held as suits the device `chosen`; `config` is used in place of its own."""
    section = recipe.model
    place: locate.Place = (section.id, None)
    if config is None:
        place = locate.resolve(section)
        with locate.explained(f"the model '{section.id}'", "model.id"):
            config = locate.read_configuration(
                place[0], revision=section.revision, trust=section.trust_remote_code, gguf=place[1]
            )
    auto = host.get().auto_class(config, recipe) or AutoModelForCausalLM
    working = chosen.working(weights_dtype(section, config)) if chosen else None
    return Source(section, config, place, auto, working)


def _check_layers(layers: list[Layer], source: Source) -> None:
    """LillamaError for a list of layers that no schedule could work on."""
    shared = tuple(f"{name}." for group in source.shared for name in group)
    for layer in layers:
        if layer.kind == "head" and layer is not layers[-1]:
            raise LillamaError("a head must be the last layer", where=layer.name)
        if layer.kind == "embedding" and layer is not layers[0]:
            raise LillamaError("an embedding must be the first layer", where=layer.name)
        if found := next((w.name for w in layer.weights if f"{w.name}.".startswith(shared)), None):
            raise LillamaError("a weight of shared modules cannot be factorised", where=found)
        swap.check_served(source.model, layer.weights)


def make_plan(recipe: Recipe, config: Any = None) -> Plan:
    """The plan of a recipe: every rank and exact parameter counts. Reads no weights, writes nothing."""
    return prepare(recipe, config).plan
