"""The plan: for every weight its rank, or dense, with exact parameter counts. Made before any training.

A strategy is a function (layers, remove, compress) -> {weight name: rank} that removes at least
`remove` parameters, or raises through `unreachable`. Weights it leaves out stay dense. One that names `spectra` gets
{weight name: what each component costs} measured on the calibration data (sensitivity.py). No torch here.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from lillama.contract import Layer, Neurons, Weight
from lillama.errors import LillamaError, did_you_mean
from lillama.lowrank.counts import stored
from lillama.lowrank.whole import NAME as DENSE
from lillama.plan.budget import Budget, bits_of, dense_form
from lillama.plan.strategies import Ranks, Spectra, uniform
from lillama.recipe.schema import Compress
from lillama.registry import STRATEGIES

UNUSED = "nothing is known of it: the model never calls it, or no prediction depends on it"
WIDE = 2048  # the width from which ranks suit the tiles of a GPU's products


@dataclass(frozen=True)
class Plan:
    """Ranks and exact counts. `before` counts the unique parameters of the original model.

    `provisional`: uniform ranks stand for those that the run will choose by what it measures, for the same size.
    `kept` are weights that had a rank, or were to have one, and stay dense after all, each with the reason.
    With a `budget` of bytes, `forms` names the storage in few bits that a weight ends in; the others stay in full.
    """

    layers: tuple[Layer, ...]
    ranks: Ranks
    storage: str
    before: int
    strategy: str = "custom"
    provisional: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    budget: Budget | None = None
    weights: dict[str, Weight] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = {w.name: w for layer in self.layers for w in layer.weights}
        object.__setattr__(self, "weights", found)

    @property
    def removed(self) -> int:
        """Parameters the plan removes."""
        weights = sum(w.original_parameters - self._left(w) for w in self.weights.values())
        return weights + sum(len(mlp.biases) * gone for mlp, gone in self._gone())

    def _gone(self) -> Iterator[tuple[Neurons, int]]:
        """Every MLP, and how many of its neurons go."""
        for mlp in (one for layer in self.layers for one in layer.neurons):
            last = self.weights[mlp.exit]
            yield mlp, (last.whole or last.shape)[1] - last.shape[1]

    def _left(self, weight: Weight) -> int:
        """How many numbers a weight holds in the end."""
        rank = self.ranks.get(weight.name)
        return weight.parameters if rank is None else stored(weight, rank, self.storage)

    @property
    def after(self) -> int:
        """Unique parameters of the compressed model."""
        return self.before - self.removed

    @property
    def reduction(self) -> float:
        """Share of all parameters that goes."""
        return self.removed / self.before

    @property
    def bytes(self) -> int | None:
        """Bytes of all weights of the last checkpoint; None where nothing was planned in bytes."""
        return None if self.budget is None else self.bytes_as(self.forms)

    def bytes_as(self, forms: Mapping[str, str]) -> int:
        """The same with the weights in other forms."""
        assert self.budget is not None
        found = self.budget.outside
        for name, weight in self.weights.items():
            rank = self.ranks.get(name)
            found += self.budget.bytes(weight, rank, forms.get(name, DENSE if rank is None else self.storage))
        return found

    def planned(self, layer: Layer) -> tuple[Weight, ...]:
        """The weights of `layer` that become low-rank."""
        return tuple(w for w in layer.weights if w.name in self.ranks)

    def narrowed(self, layer: Layer) -> tuple[Weight, ...]:
        """The weights of `layer` that lose neurons, low-rank or dense."""
        return tuple(w for w in layer.weights if w.whole)

    def changes(self, layer: Layer) -> bool:
        """Whether another layer stands for `layer` in the end."""
        return bool(self.planned(layer) or self.narrowed(layer))

    def chosen(self, layer: Layer) -> tuple[Weight, ...]:
        """Those that became low-rank or were to, before they were kept dense."""
        return tuple(w for w in layer.weights if w.name in self.ranks or w.name in self.kept)

    def keep_dense(self, reasons: Mapping[str, str]) -> Plan:
        """The plan without the weights that `reasons` names; what is tied to one of them stays dense with it."""
        more = dict(reasons)
        for name in reasons:
            for weight in self.weights.values():
                if weight.tied and name in (weight.name, weight.tied):
                    more = dict.fromkeys((weight.name, weight.tied), f"it is one with {name}") | more
        more = {name: reason for name, reason in more.items() if name in self.weights}
        ranks = {name: rank for name, rank in self.ranks.items() if name not in more}
        dense = {name: dense_form(self.weights[name], form) for name, form in self.forms.items() if name in more}
        forms = {name: form for name, form in {**self.forms, **dense}.items() if form != DENSE}
        return replace(self, ranks=ranks, kept={**self.kept, **more}, forms=forms)

    @property
    def work(self) -> list[Layer]:
        """The layers of the stream up to the last that changes: nothing above it is loaded or run."""
        last = max((i for i, layer in enumerate(self.layers) if self.changes(layer)), default=-1)
        return list(self.layers[: last + 1])

    def summary(self) -> str:
        """The size and the ranks of every kind of weight, in a line each."""
        kinds: dict[str, list[int | None]] = {}
        for layer in self.layers:
            for weight in layer.weights:
                kind = weight.name.removeprefix(f"{layer.name}.")
                kinds.setdefault(kind, []).append(self.ranks.get(weight.name))
        lines = [f"parameters {self.before:,} -> {self.after:,}, ranks by {self.strategy}:"]
        if self.budget is not None:
            lines.insert(
                0,
                f"bytes {self.budget.before:,} -> {self.bytes:,} of at most {self.budget.most:,}{_counted(self.forms)}",
            )
        if line := self._neurons():
            lines.append(line)
        for kind, all_ranks in kinds.items():
            ranks = [rank for rank in all_ranks if rank is not None]
            parts = [f"{min(ranks)} to {max(ranks)}"] if ranks else []
            parts += [f"{len(all_ranks) - len(ranks)} dense"] if len(ranks) < len(all_ranks) else []
            lines.append(f"  {kind}  {', '.join(parts)}")
        return "\n".join(lines)

    @property
    def neurons(self) -> tuple[int, int]:
        """(how many neurons of MLPs go, how many there are)."""
        exits = [self.weights[mlp.exit] for mlp, _ in self._gone()]
        return sum(gone for _, gone in self._gone()), sum((w.whole or w.shape)[1] for w in exits)

    def _neurons(self) -> str:
        """How many neurons go, in a line; empty where none do."""
        gone = {mlp.exit: count for mlp, count in self._gone()}
        if not any(gone.values()):
            return ""
        least, most = min(gone.values()), max(gone.values())
        return f"  neurons  {self.neurons[0]:,} of {self.neurons[1]:,} removed, {least} to {most} of an MLP"

    def shapes(self) -> dict[str, list[int]]:
        """What config.json says of every weight that loses neurons: the shape that is left of it."""
        return {name: list(w.shape) for name, w in self.weights.items() if w.whole}

    def modules(self) -> dict[str, dict[str, Any]]:
        """What config.json says of every replaced module."""
        weights = {name: self.weights[name] for name in self.ranks}
        return {
            name: {"kind": w.kind, "storage": self.storage, "rank": self.ranks[name]}
            | ({"tied": w.tied} if w.tied else {})
            for name, w in weights.items()
        }

    def uses(self, weight: Weight) -> list[tuple[int, Weight]]:
        """The tied weights that the factors of `weight` serve as well, with the positions of their layers."""
        layers = enumerate(self.layers)
        return [(i, w) for i, layer in layers for w in self.planned(layer) if w.tied == weight.name]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plan.json holds it."""
        weights = []
        for layer in self.layers:
            for w in layer.weights:
                row: dict[str, Any] = {"layer": layer.name, "weight": w.name}
                row |= {"shape": list(w.whole or w.shape), "copies": w.copies}
                row |= {"left": list(w.shape)} if w.whole else {}
                row |= {"tied": w.tied} if w.tied else {}
                row |= {"kept_dense": self.kept[w.name]} if w.name in self.kept else {}
                form = self.forms.get(w.name)
                row |= {"form": form, "bits": bits_of(form)} if form else {}
                counts = {"parameters": w.original_parameters, "after": self._left(w)}
                weights.append(row | {"rank": self.ranks.get(w.name)} | counts)
        return {
            "strategy": self.strategy,
            "storage": self.storage,
            "parameters": {"before": self.before, "after": self.after},
            "reduction": self.reduction,
            **({"bytes": self._bytes()} if self.budget is not None else {}),
            **({"provisional": True} if self.provisional else {}),
            "weights": weights,
        }

    def _bytes(self) -> dict[str, int | None]:
        assert self.budget is not None
        return {"before": self.budget.before, "after": self.bytes, "most": self.budget.most}


def _counted(forms: Mapping[str, str]) -> str:
    """How many weights there are in how many bits."""
    counts = Counter(bits_of(form) for form in forms.values())
    parts = [f"{count} in {bits} bits" for bits, count in sorted(counts.items(), key=str)]
    return f"; weights: {', '.join(parts)}" if parts else ""


def wants_spectra(compress: Compress) -> bool:
    """Whether the recipe's strategy decides by what is measured on the calibration data."""
    return "spectra" in STRATEGIES.needs(compress.strategy)


def observable(layer: Layer) -> tuple[Weight, ...]:
    """The weights of a layer whose effect on the predictions is measured: a tied one's counts with its embedding's."""
    return tuple(w for w in layer.weights if not w.tied)


def factor_numbers(layers: Iterable[Layer]) -> int:
    """Numbers of one of the two factors of the Fisher information of all weights, each on its weight's smaller side."""
    return sum(w.copies * min(w.shape) ** 2 for layer in layers for w in observable(layer))


def choose_ranks(layers: Sequence[Layer], before: int, compress: Compress, spectra: Spectra | None = None) -> Plan:
    """Run the recipe's strategy over the weights that are not skipped.

    A strategy that wants `spectra` and has none yet gives a provisional plan.
    Raises LillamaError with the largest possible reduction when the strategy cannot reach the recipe's, and for ranks
    that are none or remove less than was asked for.
    """
    # What is tied has the factors of its embedding, or both stay dense.
    stay = {w.tied for layer in layers for w in layer.weights if skipped(w, compress.skip)}
    stay |= {w.name for layer in layers for w in layer.weights if w.tied or skipped(w, compress.skip)}
    offered = [Layer(layer.name, tuple(w for w in layer.weights if w.name not in stay), layer.kind) for layer in layers]
    compress = compress.model_copy(update={"rank_multiple": rank_multiple(layers, compress)})
    wanting = wants_spectra(compress)
    base = before if compress.of == "model" else sum(w.original_parameters for one in layers for w in one.weights)
    narrowed = sum(w.original_parameters - w.parameters for one in layers for w in one.weights)
    remove = to_remove(base, compress) - narrowed
    left: dict[str, str] = {}
    try:
        ranks = _ranks(offered, remove, compress, spectra)
        # Before anything is measured nobody knows how much neurons save.
        unknown = spectra is None and compress.neurons is not None
        while more := {} if unknown else _hardly_smaller(offered, ranks, compress):
            left |= more
            offered = [replace(one, weights=tuple(w for w in one.weights if w.name not in left)) for one in offered]
            ranks = _ranks(offered, remove, compress, spectra)
    except LillamaError as error:
        if not hasattr(error, "most"):
            raise
        lower = f"{error.hint}, or compress.keep_dense_below" if left else error.hint
        most = int((error.most + narrowed) / base * 1e4) / 1e4
        raise LillamaError(
            f"no ranks reach a reduction of {compress.reduction:g} of the {compress.of}: "
            f"the largest possible is {most:g} with strategy {compress.strategy}",
            where="compress.reduction",
            hint=f"{lower}, ask for less, or skip fewer weights.",
        ) from error
    _check_ranks(ranks, offered, remove, compress)
    ranks = {name: int(rank) for name, rank in ranks.items()}
    tied = {w.name: ranks[w.tied] for layer in layers for w in layer.weights if w.tied in ranks}
    plan = Plan(tuple(layers), ranks | tied, compress.storage, before, compress.strategy, wanting and spectra is None)
    unseen = () if spectra is None else (w.name for one in offered for w in one.weights if w.name not in ranks)
    left |= {name: UNUSED for name in unseen if name not in (spectra or {})}
    return plan.keep_dense(left) if left else plan


def larger_numbers(layers: Iterable[Layer], entries: bool = True) -> int:
    """Numbers of the factors on the larger sides of the weights of MLPs, wanted where neurons may go.

    Without `entries` those of the exits alone, which are of inputs.
    """
    return sum(max(w.whole or w.shape) ** 2 for w in _in_mlps(layers, entries))


def smaller_numbers(layers: Iterable[Layer], entries: bool = True) -> int:
    """The same on the smaller sides: they are made of those on the larger ones, and not summed."""
    return sum(min(w.whole or w.shape) ** 2 for w in _in_mlps(layers, entries))


def _in_mlps(layers: Iterable[Layer], entries: bool) -> Iterator[Weight]:
    """The weights of MLPs, or their exits alone."""
    for layer in layers:
        weights = {weight.name: weight for weight in layer.weights}
        for mlp in layer.neurons:
            yield from (weights[name] for name in (mlp.weights if entries else (mlp.exit,)))


def to_remove(base: int, compress: Compress) -> int:
    """How many of `base` parameters the recipe wants removed."""
    if compress.reduction is None:
        raise LillamaError("no share to remove is given", where="compress.reduction")
    return -int(-compress.reduction * base // 1)  # rounded up


def rank_multiple(layers: Iterable[Layer], compress: Compress) -> int:
    """What the ranks are multiples of: that of the recipe, or what suits a model of this width."""
    if compress.rank_multiple != "auto":
        return compress.rank_multiple
    widest = max((min(w.shape) for layer in layers for w in layer.weights), default=0)
    return 64 if widest >= WIDE else 8


def _ranks(offered: Sequence[Layer], remove: int, compress: Compress, spectra: Spectra | None) -> Ranks:
    strategy: Callable[..., Ranks] = STRATEGIES.get(compress.strategy)
    if not wants_spectra(compress):
        return strategy(offered, remove, compress)
    return (
        uniform(offered, remove, compress) if spectra is None else strategy(offered, remove, compress, spectra=spectra)
    )


def _hardly_smaller(offered: Sequence[Layer], ranks: Ranks, compress: Compress) -> dict[str, str]:
    """Weights to keep dense since their factors would save too little, each with the reason; the worst of them first.

    Not all at once: what they would have saved makes others smaller, and some of them may be among those.
    """
    least = compress.keep_dense_below
    if not least:
        return {}
    found = []
    for weight in (w for layer in offered for w in layer.weights if w.name in ranks):
        saved = 1 - stored(weight, ranks[weight.name], compress.storage) / weight.parameters
        if saved < least:
            found.append((saved, weight.name))
    asked = f"compress.keep_dense_below asks for {least:.1%}"
    return {
        name: f"rank {ranks[name]} would save {saved:.1%} of its numbers, {asked}"
        for saved, name in sorted(found)[: math.ceil(len(found) / 4)]
    }


def _check_ranks(ranks: Ranks, offered: Iterable[Layer], remove: int, compress: Compress) -> None:
    """LillamaError for what a strategy must not give."""
    who, weights = f"the strategy '{compress.strategy}'", {w.name: w for layer in offered for w in layer.weights}
    for name, rank in ranks.items():
        if name not in weights:
            hint = f"It was not offered. {did_you_mean(name, weights)}"
            raise LillamaError(f"{who} gives a rank to '{name}'", where="compress.strategy", hint=hint)
        most = min(weights[name].shape)
        if not isinstance(rank, Integral) or not 1 <= rank <= most:
            hint = f"A rank of it is a whole number from 1 to {most}."
            raise LillamaError(f"{who} gives '{name}' the rank {rank!r}", where="compress.strategy", hint=hint)

    def saved(weight: Weight, rank: int) -> int:
        return weight.parameters - stored(weight, rank, compress.storage)

    removed = sum(saved(weights[name], rank) for name, rank in ranks.items())
    if removed < remove:
        smallest = min(int(compress.rank_multiple), compress.min_rank)
        possible = sum(max(saved(w, min(smallest, *w.shape)), 0) for w in weights.values())
        raise LillamaError(
            f"{who} removes {removed:,} of the {remove:,} parameters asked for, of {possible:,} that can be removed",
            where="compress.reduction",
            hint=f"Ask for less, or choose another strategy; with rank {smallest} everywhere so many can be removed.",
        )


def skipped(weight: Weight, globs: Iterable[str]) -> bool:
    """Whether the recipe wants a weight to stay dense."""
    return any(fnmatch.fnmatchcase(weight.name, glob) for glob in globs)
