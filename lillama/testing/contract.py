"""The contract every architecture plugin passes, as a list of checks."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama import host, registry
from lillama.base.device import choose
from lillama.base.progress import Progress
from lillama.base.rundir import MODEL
from lillama.bits.stage import quantise_model
from lillama.checkpoint.load import load
from lillama.checkpoint.open import open_model
from lillama.lowrank.counts import largest_rank, stored
from lillama.pretrained import sharing
from lillama.pretrained.calls import arguments
from lillama.pretrained.neurons import largest_change
from lillama.recipe.schema import Quantize
from lillama.run import pipeline, prepare
from lillama.testing.batches import Batches, example_batches
from lillama.testing.fresh import Fresh
from lillama.testing.recipes import default_recipe, full_rank_plan, recipe_for
from lillama.testing.streams import check_streams

BITS = (4, 8)
NARROW = "fewer-neurons"
FAR = {
    4: 0.4,
    8: 0.05,
}  # of half of the outputs that few bits may change: up to 0.17 and 0.015 were seen in tiny models

Step = Callable[[], None]  # called after every part of a check


@dataclass
class Subject:
    """The model that is checked, in its directory `original`, and what checks leave for later ones."""

    original: Path
    directory: Path
    batches: Batches
    plugin: str
    storages: Sequence[str]
    fresh: Fresh
    device: str = "cpu"  # where runs work; what they leave is looked at on the CPU
    trained: dict[str, pipeline.Result] = field(default_factory=dict)  # by storage, or NARROW

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The forward arguments that models are compared on."""
        return arguments(self.batches[0])

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """Schedules, losses and storages so that every two of them meet."""
        return pairwise(list(registry.SCHEDULES), list(registry.LOSSES), self.storages)

    @functools.cached_property
    def narrows(self) -> bool:
        """Whether the plugin names MLPs whose neurons may be removed."""
        return any(layer.neurons for layer in self.prepared("neurons").layers)

    def prepared(self, out: str, changes: dict[str, Any] | None = None) -> prepare.Prepared:
        """The original, opened for a small run to `out`."""
        changes = {"run.device": self.device, **(changes or {})}
        return prepare.prepare(recipe_for(self.original, self.directory / out, self.plugin, changes))


@dataclass(frozen=True)
class Check:
    """One promise of the contract: `steps` says how many parts `run` has, `advice` what a plugin may have wrong."""

    name: str
    run: Callable[[Subject, Step], None]
    advice: str
    steps: Callable[[Subject], int] = lambda subject: 1


class _Plain(pipeline.Run):
    """A run that stops at the checkpoint: no metrics are gathered, no report is drawn."""

    def finish(self, measured: dict[str, dict[str, float]]) -> pipeline.Result:
        path = self.directory.path / MODEL
        return pipeline.Result(path, self.plan, dict(measured), auto_class=self.source.auto_class.__name__)


def check_architecture(
    model: Any,
    directory: Path,
    batches: Batches | None = None,
    plugin: str = "auto",
    storages: Sequence[str] | None = None,
    device: str = "cpu",
) -> None:
    """Assert that a plugin serves `model`, a tiny randomly initialised one in float32, as the contract demands.

    - the plugin offers weights that can become smaller, all inside their layers;
    - the layers, driven one by one, give what the model gives at every layer, to float32's rounding;
    - full rank reproduces the logits to 1e-5 in every storage;
    - every loss, schedule and storage runs, and planned parameters equal the actual ones exactly;
    - the default recipe runs;
    - half of the neurons of every MLP that the plugin names can go, and a run that may remove them does;
    - in 4 and 8 bits every storage goes on working, and loads bit-equal in a fresh process;
    - a saved checkpoint loads bit-equal in a fresh process, and once more after `save_pretrained`, with what is tied
      or shared still so.

    `batches` are the model's forward arguments (default: random ones). `directory` must be empty or new.
    `storages` are the formats to try (default: all that are registered, plugins' ones too); `device` is where runs
    work (`cuda`, say).
    """
    model = model.float().eval()
    model.save_pretrained(directory / "model")
    with examined(directory / "model", directory, batches or example_batches(model), plugin, storages) as subject:
        subject.device = device
        for check in CHECKS:
            check.run(subject, lambda: None)


@contextlib.contextmanager
def examined(
    original: Path, directory: Path, batches: Batches, plugin: str, storages: Sequence[str] | None = None
) -> Iterator[Subject]:
    """The subject of checks while the block lasts: a fresh process imports meanwhile, and old objects are left alone.

    What was imported is as good as immortal; looking through it whenever a layer is done took longer than the layer.
    """
    gc.collect()
    gc.freeze()
    try:
        with Fresh(directory) as fresh:
            chosen = list(registry.STORAGES) if storages is None else list(storages)
            yield Subject(original, directory, batches, plugin, chosen, fresh)
    finally:
        gc.unfreeze()


def pairwise(*factors: Sequence[str]) -> list[tuple[str, ...]]:
    """Few combinations, one of each of `factors` in all of them, so that every two values of two factors meet."""
    every = list(itertools.product(*factors))

    def pairs(combination: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(combination), 2))

    left, chosen = set().union(*map(pairs, every)), []
    while left:
        chosen.append(max(every, key=lambda combination: len(pairs(combination) & left)))
        left -= pairs(chosen[-1])
    return chosen


def one_and_the_same(model: Any) -> set[frozenset[str]]:
    """The groups of names that are one parameter in `model`: tied weights, shared modules."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What `model` says of `inputs`: its logits, its last hidden states where it has no head, else what comes first."""
    with torch.no_grad():
        out = model(**inputs)
    return next((out[name] for name in ("logits", "last_hidden_state") if name in out), out[0])


def count(model: Any) -> int:
    """How many parameters a model has, each once."""
    return sum(p.numel() for p in model.parameters())


def _check_weights(subject: Subject, step: Step) -> None:
    prepared = subject.prepared("run")
    smaller = [w for layer in prepared.layers for w in layer.weights if largest_rank(w, w.parameters, "factors", 1)]
    assert smaller, "the plugin offers no weight that factors could make smaller"
    for layer in prepared.layers:
        prepared.source.model.get_submodule(layer.name)
        for weight in layer.weights:
            assert weight.name.startswith(layer.name), f"{weight.name} is not inside {layer.name}"
            assert weight.tied or stored(weight, 1, "factors") > 0
    step()


def _check_streams(subject: Subject, step: Step) -> None:
    prepared, hosts = subject.prepared("streams"), host.get()
    source = prepared.source
    source.fetch(subject.directory)
    model = open_model(subject.original, source.working, source.auto_class)
    sharing.share(model, source.shared)
    for one in (model, source.model):
        hosts.prepare(prepared.plugin, one, prepared.recipe)
    check_streams(prepared, model.to(prepared.device.device), subject.batches[0])
    step()


def _check_full_rank(subject: Subject, step: Step) -> None:
    auto = subject.prepared("full").source.auto_class
    expected = first_output(open_model(subject.original, torch.float32, auto), subject.inputs)
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    for storage in subject.storages:
        changes = {"compress.init": "svd", "compress.storage": storage, "distill.epochs": 0}
        prepared = subject.prepared(f"full-{storage}", changes)
        plan = full_rank_plan(prepared.layers, prepared.source.parameters, storage)
        result = _run(subject, replace(prepared, plan=plan))
        found = first_output(_loaded(result, f"full rank, {storage} storage"), subject.inputs)
        worst = float((found - expected).abs().max())
        assert worst <= bound, f"full rank in {storage} storage changes the logits by {worst:.2g}"
        step()


def _check_runs(subject: Subject, step: Step) -> None:
    for number, (schedule, loss, storage) in enumerate(subject.combinations):
        changes = {"distill.schedule": schedule, "distill.loss": loss, "compress.storage": storage}
        result = _run(subject, subject.prepared(f"run-{number}", changes))
        _loaded(result, f"schedule {schedule}, loss {loss}, {storage} storage")
        subject.trained[storage] = result
        step()


def _check_neurons(subject: Subject, step: Step) -> None:
    if not subject.narrows:
        step()
        return
    prepared = subject.prepared("neurons")
    auto = prepared.source.auto_class
    model = open_model(subject.original, torch.float32, auto)
    mlps = [mlp for layer in prepared.layers for mlp in layer.neurons]
    worst = largest_change(model, mlps, lambda model: first_output(model, subject.inputs))
    assert worst <= 1, f"neurons depend on each other: without half of them outputs are {worst:.2g} times too far off"
    step()
    prepared = default_recipe(subject.original, subject.directory / NARROW, subject.plugin, subject.device, neurons=0.5)
    result = _run(subject, prepared)
    _loaded(result, "with fewer neurons")
    subject.trained[NARROW] = result
    step()


def _check_defaults(subject: Subject, step: Step) -> None:
    prepared = default_recipe(subject.original, subject.directory / "defaults", subject.plugin, subject.device)
    result = pipeline.Run(prepared, Progress(), batches=subject.batches).execute()
    inputs = {name: t.to(prepared.source.dtype) if t.is_floating_point() else t for name, t in subject.inputs.items()}
    found = first_output(_loaded(result, "the default recipe"), inputs)
    assert bool(torch.isfinite(found).all()), "after the default recipe the model's output is not finite"
    step()


def _check_saved(subject: Subject, step: Step) -> None:
    for storage, result in subject.trained.items():
        first = load(result.path).eval()
        once = first_output(first, subject.inputs)
        there, parameters = subject.fresh.run(result.path, subject.inputs, result.auto_class)
        assert torch.equal(once, there), f"a fresh process computes other logits ({storage} storage)"
        assert count(first) == parameters, "a fresh process does not share what is shared"
        again = subject.directory / f"again-{storage}"
        first.save_pretrained(again)
        second = load(again).eval()
        assert torch.equal(once, first_output(second, subject.inputs)), "saving the loaded model changed it"
        assert one_and_the_same(first) == one_and_the_same(second), "saving the loaded model changed what it shares"
        assert count(second) == result.plan.after, "it is no longer as small"
        first.tie_weights()  # evaluators do so
        same = torch.equal(once, first_output(first, subject.inputs))
        assert same, "config.tie_word_embeddings is not what the model is"
        step()


def _check_few_bits(subject: Subject, step: Step) -> None:
    offered = [(w.name, w.kind) for layer in subject.prepared("bits").layers for w in layer.weights]
    device, progress = choose(subject.device, "float32"), Progress()
    for (storage, result), bits in itertools.product(subject.trained.items(), BITS):
        what = f"{storage} storage in {bits} bits"
        model = load(result.path).eval()
        full = first_output(model, subject.inputs)
        section = Quantize.model_validate({"bits": bits, "what": "all", "storage": "keep"})
        done = quantise_model(
            model, section, offered=offered, batches=subject.batches, device=device, progress=progress
        )
        assert {c.target.name for c in done} >= set(result.plan.ranks), f"{what}: weights were forgotten"
        once = first_output(model, subject.inputs)
        far = _typical_change(full, once)
        assert far < FAR[bits], f"{what} changes half of the outputs by {far:.2g} of them, or more"
        target = subject.directory / f"bits-{storage}-{bits}"
        model.save_pretrained(target)
        there, _ = subject.fresh.run(target, subject.inputs, result.auto_class)
        assert torch.equal(once, there), f"a fresh process computes other outputs ({what})"
        load(target).save_pretrained(target / "again")
        again = first_output(load(target / "again").eval(), subject.inputs)
        assert torch.equal(once, again), f"saving the loaded model changed it ({what})"
        step()


def _typical_change(before: Tensor, after: Tensor) -> float:
    """By how much of itself the middle one of the outputs changes: rows of the last dimension, shape (..., outputs).

    Not the largest: where a router is undecided, a last bit sends a token to another expert and changes all of its row.
    """
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())


def _run(subject: Subject, prepared: prepare.Prepared) -> pipeline.Result:
    return _Plain(prepared, Progress(), batches=subject.batches).execute()


def _loaded(result: pipeline.Result, what: str) -> Any:
    """The result of a run, which must have the parameters that were planned."""
    model = load(result.path).eval()
    actual = count(model)
    assert actual == result.plan.after, f"{what}: planned {result.plan.after} parameters, got {actual}"
    return model


CHECKS = (
    Check(
        "layers and weights",
        _check_weights,
        "enumerate_layers must list modules by their dotted names, in the order in which the model runs them, each "
        "with weights inside it.",
    ),
    Check(
        "exact streams",
        _check_streams,
        "Something happens between two layers that the list leaves out (a norm or a projection: list it as a layer "
        "without weights), or the model hands more than hidden states from one to the next.",
    ),
    Check(
        "full rank",
        _check_full_rank,
        "Compare shapes, kinds and groups with the modules: Layer.of_linears reads them off. A module with a forward "
        "of its own cannot be replaced.",
        lambda subject: len(subject.storages),
    ),
    Check(
        "losses, schedules, storages",
        _check_runs,
        "A weight may be counted or replaced twice: list each once, in one layer.",
        lambda subject: len(subject.combinations),
    ),
    Check(
        "fewer neurons",
        _check_neurons,
        "What Layer.neurons names must be the linears of one MLP, the one that ends it last, with nothing between them "
        "that looks at more than one neuron.",
        lambda subject: 2 if subject.narrows else 1,
    ),
    Check(
        "default recipe",
        _check_defaults,
        "It measures gradients: every listed weight must take part in the forward pass. Leave out those that do not.",
    ),
    Check(
        "saved and loaded",
        _check_saved,
        "The model's class must save and load what it holds; where modules are one and the same, the hook "
        "shared_modules must say so.",
        lambda subject: len(subject.storages) + subject.narrows,
    ),
    Check(
        "few bits",
        _check_few_bits,
        "The model's class must load what it saves of modules that are no nn.Linear any more.",
        lambda subject: (len(subject.storages) + subject.narrows) * len(BITS),
    ),
)
