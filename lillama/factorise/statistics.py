"""What initialisers are told of the calibration data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lillama.base.device import Device
from lillama.base.rundir import FISHER, RunDirectory
from lillama.contract import Layer
from lillama.factorise import embedding
from lillama.factorise.known import FisherFactors, Known, WeightStatistics
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batches


def fisher_file(layer: Layer) -> str:
    """Where what is found of a layer is kept while a run needs it."""
    return f"{FISHER}/{layer.name}.safetensors"


def narrow_file(layer: Layer) -> str:
    """Where what is left of weights that lose neurons is kept while a run needs it."""
    return f"{FISHER}/{layer.name}.narrow.safetensors"


def read_narrow(directory: RunDirectory, layer: Layer) -> dict[str, dict[str, Tensor]]:
    """What neurons.py left of a layer: by weight its `matrix`, `input`, `output` and `bias`; nothing where all stay."""
    found: dict[str, dict[str, Tensor]] = {}
    if any(weight.whole for weight in layer.weights):
        for key, tensor in directory.tensors(narrow_file(layer)).items():
            name, _, part = key.rpartition(".")
            found.setdefault(name, {})[part] = tensor
    return found


def write_fisher(directory: RunDirectory, layer: Layer, found: Mapping[str, FisherFactors]) -> None:
    """Store what was found of a layer's weights, as `<weight>.input`, `<weight>.output`, `<weight>.spectrum`, ..."""
    every = {f"{name}.{part}": t for name, factors in found.items() for part, t in factors._asdict().items()}
    directory.put_tensors(fisher_file(layer), {name: t for name, t in every.items() if t is not None})


def read_fisher(directory: RunDirectory, layer: Layer) -> dict[str, FisherFactors]:
    """What `write_fisher` stored."""
    tensors = directory.tensors(fisher_file(layer))
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    parts = {name: {part: tensors.get(f"{name}.{part}") for part in FisherFactors._fields} for name in names}
    return {name: FisherFactors(**given) for name, given in parts.items()}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Statistics:
    """What is known of a run's data besides the Grams, which are summed while a layer runs (grams.py).

    `raw` are the batches that are trained on; `wanted` the factors of the Fisher information that the initialiser
    names; `floor` what every token of an embedding counts for at least (embedding.py).
    """

    plan: Plan
    directory: RunDirectory
    device: Device
    raw: Batches
    wanted: frozenset[str]
    floor: float

    @functools.cached_property
    def counts(self) -> Tensor:
        """How often each token occurs in the calibration data that is trained on."""
        vocabulary = next(w.shape[0] for layer in self.plan.layers for w in layer.weights if w.kind == "embedding")
        return embedding.token_counts(self.raw, vocabulary)

    def complete(self, layer: Layer, grams: Known | None) -> Known | None:
        """`grams`, and what else an initialiser is to know of the planned weights of `layer`; None: nothing.

        The factors of their Fisher information, where it names them; of an embedding token counts and a tied head's
        Gram.
        """
        known = grams
        if self.wanted:
            found = self._read_fisher(layer)
            known = {name: (grams or {}).get(name, WeightStatistics()).with_more(f) for name, f in found.items()}
        if known is None or layer.kind != "embedding":
            return known
        completed = dict(known)
        for weight in self.plan.planned(layer):
            more = {"counts": embedding.floored(self.counts, self.floor)}
            heads = [known[use.name].gram for _, use in self.plan.uses(weight) if use.name in known]
            gram = next((gram for gram in heads if gram is not None), None)
            more |= {} if gram is None else {"head_gram": gram}
            completed[weight.name] = known.get(weight.name, WeightStatistics()).with_more(more)
        return completed

    def _read_fisher(self, layer: Layer) -> dict[str, dict[str, Tensor]]:
        stored, narrow = read_fisher(self.directory, layer), read_narrow(self.directory, layer)
        found: dict[str, dict[str, Tensor]] = {}
        for weight in self.plan.planned(layer):
            factors, left = stored.get(weight.name), narrow.get(weight.name)
            given = {} if factors is None else {"input_fisher": factors.input, "output_fisher": factors.output}
            if left is not None:
                given = {"input_fisher": left["input"], "output_fisher": left["output"], "left": left["matrix"]}
            found[weight.name] = {n: t.to(self.device.device) for n, t in given.items() if n in {*self.wanted, "left"}}
        return found
