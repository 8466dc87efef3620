"""Which neurons of an MLP can go, what that costs the predictions, and what is left of its weights then.

A neuron j of an MLP goes with column w_j of the weight W that ends it. By the Fisher information of W (sensitivity.py),
with H of what it reads and G of its outputs, the best that the columns left can do about it is Optimal Brain Surgeon's
(Hassibi and Stork, 1993): W loses w_j P_j / P_jj, with P = H^-1, and that costs 1/2 w_j^T G w_j / P_jj nats per token.
Neurons go in blocks, the cheapest first; after a block P is that of the neurons left, so that what the gone ones shared
with others counts. For any set of neurons that stay the best W is then W H_:S H_SS^-1, in closed form.

The rows of the entries that gave those neurons their numbers just go. What is left is factorised as any weight is: its
factors are those of the neurons that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lillama.base import ranks, shares
from lillama.base.device import factorising
from lillama.base.rundir import FISHER, RunDirectory
from lillama.base.threads import side_by_side
from lillama.contract import Layer, Neurons, relative
from lillama.factorise.initialisers import INPUT_RIDGE, OUTPUT_RIDGE, fisher_spectrum, regularised, through
from lillama.factorise.statistics import narrow_file, read_fisher
from lillama.lowrank.swap import dense
from lillama.plan.budget import Narrowing
from lillama.pretrained.walk import Walk

STEPS = 6  # widths that are tried, besides the whole one
BLOCKS = 32  # neurons go so many times, of all there are: one at a time costs the same to three digits
LEAST_BLOCK = 16


class Whole(NamedTuple):
    """A weight W (d_out x d_in) and both factors of its Fisher information, each on its own side."""

    W: Tensor
    input: Tensor  # d_in x d_in
    output: Tensor  # d_out x d_out


def widths(neurons: int, share: float, multiple: int) -> list[int]:
    """How many of so many neurons may be left, falling: all, and down to all but `share`, in even steps."""
    found = [neurons]
    for step in range(1, STEPS + 1):
        left = -int(-(neurons * (1 - share * step / STEPS)) // multiple) * multiple  # rounded up
        if 0 < left < found[-1]:
            found.append(left)
    return found


class Going(NamedTuple):
    """In which order the neurons of an MLP go, and what it is like at every width that is tried, all neurons first."""

    order: Tensor  # their numbers
    costs: list[float]  # in nats per token
    exits: list[Tensor]  # what is left of the weight that ends the MLP, columns rising, in float64


def order_neurons(last: Whole, left: Sequence[int]) -> Going:
    """The order in which neurons go until so many are `left`, which falls, the first being all of them.

    `last` is the weight that ends the MLP.
    """
    P = torch.cholesky_inverse(torch.linalg.cholesky(regularised(last.input, INPUT_RIDGE)))
    T = torch.linalg.cholesky(regularised(last.output, OUTPUT_RIDGE), upper=True)
    W = T @ last.W.double()
    count = W.shape[1]
    block = max(count // BLOCKS, LEAST_BLOCK)
    there = torch.ones(count, dtype=torch.bool, device=W.device)
    gone = [torch.zeros(0, dtype=torch.int64, device=W.device)]
    costs, exits, neurons = [0.0], [last.W.double()], count
    for aim in left[1:]:
        total = costs[-1]
        while neurons > aim:
            cost = torch.where(there, W.square().sum(0) / P.diagonal(), torch.inf)
            chosen = cost.argsort(stable=True)[: min(block, neurons - aim)]
            columns, rows = W[:, chosen], P[chosen]
            among = rows[:, chosen]
            undone = torch.linalg.solve(among, rows)  # what each column left takes of those that go
            total += 0.5 * float((columns.T @ columns * torch.linalg.inv(among)).sum())
            # In place, what is gone as zeros: to cut it out copies both matrices every time.
            W.addmm_(columns, undone, alpha=-1)
            P.addmm_(rows.T, undone, alpha=-1)
            W[:, chosen], P[:, chosen], P[chosen] = 0.0, 0.0, 0.0
            there[chosen] = False
            gone.append(chosen)
            neurons -= len(chosen)
        costs.append(total)
        exits.append(torch.linalg.solve_triangular(T, W[:, there], upper=True))
    return Going(torch.cat(gone), costs, exits)


def stay(order: Tensor, neurons: int, left: int) -> Tensor:
    """The numbers of the neurons that are left, rising."""
    there = torch.ones(neurons, dtype=torch.bool)
    there[order[: neurons - left].cpu()] = False
    return there.nonzero().flatten().to(order.device)


def best_left(weight: Whole, kept: Tensor) -> Tensor:
    """The best columns `kept` of a weight that ends an MLP, once the others are gone, in float64: W H_:S H_SS^-1."""
    H = regularised(weight.input, INPUT_RIDGE)
    return torch.linalg.solve(H[kept][:, kept], H[kept] @ weight.W.double().T).T


def without(weight: Whole, kept: Tensor, exit: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(the matrix that is left, its H and G as `initialisers.fisher` wants them: on its smaller side), in float64.

    `exit` is that matrix already, of a weight that ends its MLP: without it the weight is one of the MLP's entries.
    """
    if exit is not None:
        W = exit
        inner, outer = weight.input[kept][:, kept], weight.output.double()
    else:
        W = weight.W.double()[kept]
        inner, outer = weight.input.double(), weight.output[kept][:, kept]
    if W.shape[0] <= W.shape[1]:
        return W, through(W, inner), outer
    return W, inner, through(W.T, outer)


def narrowings(
    mlp: Neurons, weights: Mapping[str, Whole], known: Mapping[str, Tensor], left: Sequence[int]
) -> tuple[Tensor, list[Narrowing]]:
    """(the neurons in the order in which they go, what the widths `left` of an MLP cost, the whole one first).

    `known` are the spectra of its weights while all neurons are there.
    """
    place = factorising(weights[mlp.exit].W.device)
    here = {name: Whole(*(tensor.to(place) for tensor in one)) for name, one in weights.items()}
    count = here[mlp.exit].W.shape[1]
    going = order_neurons(here[mlp.exit], left)
    exits = dict(zip(left, going.exits))
    tasks = [(one, name) for one in left[1:] for name in mlp.weights]
    spectra = {task: torch.zeros(min(here[task[1]].W.shape), dtype=torch.float64, device=place) for task in tasks}

    def find(task: tuple[int, str]) -> Tensor:
        one, name = task
        kept = stay(going.order, count, one)
        return fisher_spectrum(*without(here[name], kept, exits[one] if name == mlp.exit else None))

    for task, found in zip(tasks, side_by_side(find, tasks, place, max(map(len, spectra.values()), default=0))):
        spectra[task][: len(found)] = found
    spectra |= {(count, name): known[name] for name in mlp.weights}
    return going.order, [
        Narrowing(one, cost, {name: spectra[one, name].tolist() for name in mlp.weights})
        for one, cost in zip(left, going.costs)
    ]


def neurons_file(layer: Layer) -> str:
    """Where what is found of the neurons of a layer is kept while a run needs it."""
    return f"{FISHER}/{layer.name}.neurons.safetensors"


class Known(NamedTuple):
    """Of the weights of a layer what their neurons' going is found from: the weights themselves, and their spectra."""

    layer: Layer
    weights: Mapping[str, Whole]
    spectra: Mapping[str, Tensor]


class Widths:
    """Finds how narrow the MLPs of layers may be: of as many layers at once as the run has processes, of each by one.

    Of an MLP at most a `share` of the neurons goes, and a multiple of `multiple` stays.
    """

    def __init__(self, directory: RunDirectory, share: float, multiple: int) -> None:
        self.directory, self.share, self.multiple = directory, share, multiple
        self.waiting: list[Known] = []

    def add(self, known: Known) -> None:
        """Find and store the widths of a layer, once there is one for every process; each keeps its own until then."""
        own = len(self.waiting) == ranks.rank()
        self.waiting.append(known if own else known._replace(weights={}, spectra={}))
        if len(self.waiting) == ranks.world():
            self.finish()

    def finish(self) -> None:
        """Find and store those of the layers that wait."""
        for known, found in shares.one_each(self.waiting, lambda own: find_widths(own, self.share, self.multiple)):
            self.directory.put_tensors(neurons_file(known.layer), found or {})
        self.waiting.clear()


def find_widths(known: Known, share: float, multiple: int) -> dict[str, Tensor]:
    """What is stored of a layer's neurons, on the host: the widths of its MLPs, and the larger factors of weights."""
    layer, weights = known.layer, known.weights
    tensors: dict[str, Tensor] = {}
    for mlp in layer.neurons:
        if not weights.keys() >= {*mlp.weights}:  # some prediction depends on no gradient of it
            continue
        name = mlp.exit
        left = widths(weights[name].W.shape[1], share, multiple)
        order, ways = narrowings(mlp, weights, known.spectra, left)
        tensors |= {f"{one}.larger": _larger(weights[one]).float() for one in mlp.weights}
        tensors[f"{name}.order"] = order
        tensors[f"{name}.left"] = torch.tensor([way.left for way in ways])
        tensors[f"{name}.costs"] = torch.tensor([way.loss for way in ways], dtype=torch.float64)
        for one in mlp.weights:
            tensors[f"{one}.spectra"] = torch.tensor([way.spectra[one] for way in ways], dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def read_narrowings(directory: RunDirectory, layer: Layer) -> dict[str, list[Narrowing]]:
    """The widths that the MLPs of a layer may have, by their exits."""
    tensors = directory.tensors(neurons_file(layer))
    found = {}
    for mlp in layer.neurons:
        if f"{mlp.exit}.order" not in tensors:
            continue
        lists = {name: tensors[f"{name}.spectra"].tolist() for name in mlp.weights}
        each = zip(tensors[f"{mlp.exit}.left"].tolist(), tensors[f"{mlp.exit}.costs"].tolist())
        found[mlp.exit] = [
            Narrowing(left, cost, {name: rows[i] for name, rows in lists.items()})
            for i, (left, cost) in enumerate(each)
        ]
    return found


@torch.no_grad()
def remove_neurons(walk: Walk, directory: RunDirectory, layers: Sequence[Layer]) -> None:
    """Store what is left of the weights of `layers` that lose neurons, where that was not done before.

    Of each its matrix, its bias, and the factors of its Fisher information, as `statistics.read_narrow` reads them.
    """

    def left_of(layer: Layer) -> dict[str, Tensor]:
        with walk.open_layer(layer) as module:
            return _left_of(layer, module, directory, walk.device.device)

    narrow = [one for one in layers if any(w.whole for w in one.weights) and not directory.has(narrow_file(one))]
    for layer, found in shares.one_each(narrow, left_of):
        directory.put_tensors(narrow_file(layer), found or {})


def _left_of(layer: Layer, module: nn.Module, directory: RunDirectory, device: torch.device) -> dict[str, Tensor]:
    known, tensors = read_fisher(directory, layer), directory.tensors(neurons_file(layer))
    weights = {weight.name: weight for weight in layer.weights}
    place, found = factorising(device), dict[str, Tensor]()
    for mlp in layer.neurons:
        if (whole := weights[mlp.exit].whole) is None:
            continue
        kept = stay(tensors[f"{mlp.exit}.order"], whole[1], weights[mlp.exit].shape[1]).to(place)
        for name in mlp.weights:
            is_exit, linear = name == mlp.exit, cast(nn.Linear, module.get_submodule(relative(weights[name], layer)))
            W = dense(module, relative(weights[name], layer), weights[name].kind)
            one = whole_of(W, (known[name].input, known[name].output), tensors[f"{name}.larger"])
            one = Whole(*(tensor.to(place) for tensor in one))
            parts = dict(
                zip(("matrix", "input", "output"), without(one, kept, best_left(one, kept) if is_exit else None))
            )
            if (bias := linear.bias) is not None:
                parts["bias"] = bias.detach() if is_exit else bias.detach().to(place)[kept]
            found |= {f"{name}.{part}": tensor.float().cpu() for part, tensor in parts.items()}
    return found


def _larger(one: Whole) -> Tensor:
    return one.input if one.W.shape[0] <= one.W.shape[1] else one.output


def whole_of(W: Tensor, factors: tuple[Tensor, Tensor], larger: Tensor) -> Whole:
    """A weight with `factors` (H, G) on its smaller side, and the other one on its `larger`."""
    return Whole(W, larger, factors[1]) if W.shape[0] <= W.shape[1] else Whole(W, factors[0], larger)
