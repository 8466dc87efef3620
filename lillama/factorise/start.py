"""Starting factors of a layer's weights, by the recipe's initialiser."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lillama.base import ranks, shares
from lillama.base.device import factorising
from lillama.base.finite import is_finite
from lillama.base.threads import side_by_side
from lillama.contract import Weight, relative
from lillama.factorise import embedding
from lillama.factorise.grams import GRAMS
from lillama.factorise.known import Known, WeightStatistics
from lillama.lowrank import swap
from lillama.lowrank.fit import factors_fit, rescaled
from lillama.lowrank.storage import Factors
from lillama.plan.plan import UNUSED, Plan
from lillama.pretrained.walk import LayerPass
from lillama.recipe.schema import Recipe
from lillama.registry import INITIALISERS, LOSSES

FISHER_FACTORS = frozenset(("input_fisher", "output_fisher"))


class Needs(NamedTuple):
    """What the recipe's named choices want, by the names of their parameters."""

    streams: frozenset[str]  # on which its loss runs: "teacher", "student"
    grams: frozenset[str]  # that its initialiser names (grams.py)
    fisher: frozenset[str]  # factors of the Fisher information that it names (sensitivity.py)


def find_needs(recipe: Recipe) -> Needs:
    """What the recipe's loss and initialiser want."""
    streams = frozenset(name.removeprefix("on_") for name in LOSSES.needs(recipe.distill.loss))
    named = INITIALISERS.needs(recipe.compress.init)
    return Needs(streams, GRAMS & named, FISHER_FACTORS & named)


@dataclass(frozen=True)
class Initialiser:
    """A registered initialiser, given what it names: `seed` is that of what it draws.

    `dtype` is the type that the checkpoint holds its factors in; `refused` says of weights whose factors are of no use
    why they are not.
    """

    function: Callable[..., tuple[Tensor, Tensor]]
    names: frozenset[str]
    seed: int
    dtype: torch.dtype = torch.float32
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Initialiser:
        """The recipe's."""
        name = recipe.compress.init
        return cls(INITIALISERS.get(name), INITIALISERS.needs(name), recipe.run.seed, dtype)

    def __call__(self, weight: Weight, W: Tensor, rank: int, known: WeightStatistics | None) -> Factors:
        """Float32 factors of `weight`, whose matrix (or stack of them) is W; `known`: what was measured."""
        generator = self._seeded(weight.name) if "generator" in self.names else None
        device, place = W.device, factorising(W.device)
        W, known = W.to(place), (known or WeightStatistics()).to(place)
        if weight.kind == "experts":
            each = [self._start(one, rank, known.of_copy(i), generator) for i, one in enumerate(W)]
            A, B = (torch.stack([factor.float() for factor in both]) for both in zip(*each))
        elif weight.kind == "embedding":
            start = functools.partial(self._start, generator=generator)
            A, B = embedding.factorise(start, self.names, W, rank, known)
        else:
            A, B = self._start(W, rank, known, generator)
        return Factors(A.float().to(device), B.float().to(device))

    def lacks(self, weight: Weight, known: WeightStatistics | None) -> bool:
        """Whether nothing was measured of what the initialiser names: the model does not use the weight."""
        wanted = self.names & (FISHER_FACTORS if weight.kind == "embedding" else FISHER_FACTORS | GRAMS)
        if wanted and (known is None or not known.known(wanted)):
            self.refused[weight.name] = UNUSED
        return weight.name in self.refused

    def usable(self, weight: Weight, factors: Factors, storage: str) -> bool:
        """Whether factors stay finite in `storage` and in the checkpoint's type; where not, the reason is kept."""
        if not is_finite(*factors):
            self.refused[weight.name] = "its starting factors are not finite"
        elif not (factors_fit(factors, storage, self.dtype) or factors_fit(rescaled(factors), storage, self.dtype)):
            name = str(self.dtype).removeprefix("torch.")
            self.refused[weight.name] = f"its starting factors are too large for {storage} in {name}"
        return weight.name not in self.refused

    def _start(
        self, W: Tensor, rank: int, known: WeightStatistics, generator: Generator | None
    ) -> tuple[Tensor, Tensor]:
        drawing = {} if generator is None else {"generator": generator}
        return self.function(W, rank, **drawing, **known.known(self.names))

    def _seeded(self, name: str) -> Generator:
        # By name, so that neither the schedule nor a resume changes what is drawn.
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def initial_factors(
    at: LayerPass, plan: Plan, initialise: Initialiser, known: Known | None, weights: Iterable[Weight] | None = None
) -> dict[str, Factors]:
    """The starting factors of a layer's planned weights, or of `weights`, by name, in float32.

    Those of stacked weights have one more dimension, in front. A tied weight has none of its own. Factors that are not
    finite, or would not be in the checkpoint, are left out (`Initialiser.refused`).
    """
    wanted = [weight for weight in (plan.planned(at.layer) if weights is None else weights) if not weight.tied]

    def about(weight: Weight) -> WeightStatistics | None:
        return None if known is None else known.get(weight.name)

    def start(weight: Weight) -> Factors:
        held = about(weight)
        left = None if held is None else held.left
        W = swap.dense(at.teacher, relative(weight, at.layer), weight.kind) if left is None else left
        return initialise(weight, W, plan.ranks[weight.name], held)

    # The processes of the run share the weights out.
    own = shares.own_of(wanted, [_cost(weight) for weight in wanted])
    own = [weight for weight in own if not initialise.lacks(weight, about(weight))]
    device = next(at.teacher.parameters()).device
    each = side_by_side(start, own, factorising(device), max(map(_rows, own), default=0))
    found = {one.name: both for one, both in zip(own, each) if initialise.usable(one, both, plan.storage)}
    if ranks.world() == 1:
        return found
    on_host = {name: Factors(*(factor.cpu() for factor in both)) for name, both in found.items()}
    everyone = ranks.gather((on_host, dict(initialise.refused)))
    for theirs, refused in everyone:
        initialise.refused.update(refused)
        found |= {name: Factors(*(factor.to(device) for factor in both)) for name, both in theirs.items()}
    return {weight.name: found[weight.name] for weight in wanted if weight.name in found}


def _cost(weight: Weight) -> float:
    """How much work it is to factorise a weight, in no unit."""
    return float(weight.copies * min(weight.shape) ** 2 * max(weight.shape))


def _rows(weight: Weight) -> int:
    """Rows of the largest matrix that is handled: of an embedding the whole table."""
    return max(weight.shape) if weight.kind == "embedding" else min(weight.shape)


def to_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as a file holds them: `<weight>.A`, `<weight>.B`."""
    return {f"{name}.{letter}": t for name, both in factors.items() for letter, t in zip("AB", both)}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What `to_tensors` wrote."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {name: Factors(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
