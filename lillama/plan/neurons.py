"""How many neurons every MLP keeps, in one budget with the ranks (`compress.neurons`). No torch here.

A neuron that is removed frees a row of every entry of its MLP and a column of the exit, and costs no further product
when the model runs, as a second factor does. So a whole MLP may be kept in several widths, and each of its weights then
dense or at some rank. All of it is weighed by one price, nats per token for a number: at a given price every MLP and
every other weight takes what costs least, numbers paid for; the price is the lowest that removes enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lillama.contract import Layer, Weight
from lillama.plan.budget import Measured, Narrowing
from lillama.plan.fisher import choices
from lillama.plan.plan import rank_multiple, skipped, to_remove
from lillama.recipe.schema import Compress

LEAST, MOST = 1e-14, 1e2  # prices, in nats per token for a number: nothing goes, and everything
HALVINGS = 50


def choose_neurons(
    layers: Sequence[Layer], before: int, compress: Compress, measured: Measured
) -> tuple[list[Layer], Measured]:
    """The layers with MLPs as narrow as is best for the size that the recipe asks for, and what is known of them then.

    What ranks they get is left to the recipe's strategy. An MLP of which the recipe skips a weight keeps all neurons.
    """
    compress = compress.model_copy(update={"rank_multiple": rank_multiple(layers, compress)})
    stay = {w.name for layer in layers for w in layer.weights if skipped(w, compress.skip)}
    offers = _offers(layers, compress, measured, stay)
    base = before if compress.of == "model" else sum(w.parameters for layer in layers for w in layer.weights)
    room = sum(w.parameters for layer in layers for w in layer.weights) - to_remove(base, compress)
    untouched = {name for offer in offers for name in offer.names}
    room -= sum(w.parameters for layer in layers for w in layer.weights if w.name not in untouched)
    low, high = LEAST, MOST
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        low, high = (low, price) if sum(offer.at(price).numbers for offer in offers) <= room else (price, high)
    taken = {offer.exit: offer.at(high).narrowing for offer in offers if offer.exit}
    return _narrowed(layers, measured, {name: one for name, one in taken.items() if one is not None})


@dataclass(frozen=True)
class _Way:
    """One way to keep an MLP or another weight: how much is lost, apart from what ranks lose of each weight."""

    loss: float
    weights: tuple[tuple[tuple[int, float], ...], ...]  # of each, the numbers and losses to be had
    narrowing: Narrowing | None = None

    def cost(self, price: float) -> tuple[float, int]:
        """(what it costs at the price, the numbers that are left)."""
        best = [min((loss + price * numbers, numbers) for numbers, loss in each) for each in self.weights]
        return self.loss + sum(cost for cost, _ in best), sum(numbers for _, numbers in best)


@dataclass(frozen=True)
class _Taken:
    numbers: int
    narrowing: Narrowing | None


@dataclass(frozen=True)
class _Offer:
    """Weights that are decided on together, and the ways to keep them."""

    names: tuple[str, ...]
    ways: tuple[_Way, ...]
    exit: str = ""

    def at(self, price: float) -> _Taken:
        """The way that costs least at a price; of equals the one that leaves more."""
        costs = [(*way.cost(price), way) for way in self.ways]
        _, numbers, way = min(costs, key=lambda one: (one[0], -one[1]))
        return _Taken(numbers, way.narrowing)


def _offers(layers: Sequence[Layer], compress: Compress, measured: Measured, stay: set[str]) -> list[_Offer]:
    """What there is to decide on: MLPs whose neurons may go, and every other weight that something is known of."""
    found: list[_Offer] = []
    in_mlps: set[str] = set()
    for layer in layers:
        weights = {w.name: w for w in layer.weights}
        for mlp in layer.neurons:
            narrowings = measured.narrowings.get(mlp.exit)
            if narrowings and not stay.intersection(mlp.weights):
                ways = [_way([weights[name] for name in mlp.weights], mlp.exit, one, compress) for one in narrowings]
                found.append(_Offer(mlp.weights, tuple(ways), mlp.exit))
                in_mlps.update(mlp.weights)
    every = [w for layer in layers for w in layer.weights if w.name not in stay | in_mlps and not w.tied]
    for weight in every:
        if weight.name in measured.spectra:
            kept = _kept(weight, measured.spectra[weight.name], compress)
            found.append(_Offer((weight.name,), (_Way(0.0, (kept,)),)))
    return found


def _way(weights: Sequence[Weight], last: str, one: Narrowing, compress: Compress) -> _Way:
    narrow = (_narrow(weight, one.left, weight.name == last) for weight in weights)
    return _Way(one.loss, tuple(_kept(weight, one.spectra[weight.name], compress) for weight in narrow), one)


def _kept(weight: Weight, spectrum: Sequence[float], compress: Compress) -> tuple[tuple[int, float], ...]:
    return tuple((choice.numbers, choice.loss) for choice in choices(weight, spectrum, compress))


def _narrow(weight: Weight, left: int, is_exit: bool) -> Weight:
    """A weight of an MLP with so many neurons left."""
    whole = weight.whole or weight.shape
    shape = (whole[0], left) if is_exit else (left, whole[1])
    return weight if shape == weight.shape else replace(weight, shape=shape, whole=whole)


def _narrowed(
    layers: Sequence[Layer], measured: Measured, taken: Mapping[str, Narrowing]
) -> tuple[list[Layer], Measured]:
    weights = {w.name: w for layer in layers for w in layer.weights}
    left: dict[str, tuple[int, int]] = {}
    spectra = dict(measured.spectra)
    for mlp in (one for layer in layers for one in layer.neurons):
        if one := taken.get(mlp.exit):
            left |= {name: _narrow(weights[name], one.left, name == mlp.exit).shape for name in mlp.weights}
            spectra |= one.spectra
    return narrow_layers(layers, left), replace(measured, spectra=spectra)


def narrow_layers(layers: Sequence[Layer], left: Mapping[str, tuple[int, int]]) -> list[Layer]:
    """The layers with the weights that `left` names in the shapes it gives: what an earlier process settled."""
    return [
        replace(
            layer,
            weights=tuple(
                w if left.get(w.name, w.shape) == w.shape else replace(w, shape=left[w.name], whole=w.whole or w.shape)
                for w in layer.weights
            ),
        )
        for layer in layers
    ]
