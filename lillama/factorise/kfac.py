"""The two factors of the Fisher information of a layer's weights (K-FAC, arXiv 1503.05671), summed while it runs back.

See sensitivity.py for what they are and who asks. Both are kept on the weight's smaller side.

An embedding is the map W^T of one-hot vectors, so W H W^T is the Gram of the vectors looked up, and G is of their
gradients. To a head that is tied to it, an error e_t of row t costs 1/2 p_t e_t H e_t^T, with H the Gram of the head's
inputs and p_t the chance of token t, which is about how often it occurs. That is what H would cost beside G, by as much
as the predictions are uncertain (mean |g|^2 = 1 - sum p_t^2): both uses together are one such problem.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.base import ranks, shares
from lillama.base.device import Device, factorising
from lillama.base.threads import side_by_side
from lillama.contract import Layer, Weight, relative
from lillama.dense.experts import layout_of
from lillama.dense.plain import around, is_plain_embedding
from lillama.factorise.grams import counted, kept_rows
from lillama.factorise.initialisers import fisher_spectrum
from lillama.factorise.known import FisherFactors, TokenSample, refuse_unless_finite
from lillama.factorise.neurons import Whole, whole_of
from lillama.factorise.sums import Sums
from lillama.lowrank.swap import dense, module_of
from lillama.plan.plan import observable

log = logging.getLogger(__name__)

UNCALLED = "the model's forward pass never calls its module, so nothing is known of it"
BLIND = "no gradient of the predictions reaches it (it chooses what others read, say), so nothing is known of it"

Problem = tuple[Tensor, Tensor, Tensor]  # W and the two factors of its Fisher information, on its smaller side


class _Shared:
    """The sum over inputs of several weights, and which of them have come for the tensor that was added last."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self.last: Tensor | None = None
        self.came: set[str] = set()

    def has(self, x: Tensor, name: str) -> bool:
        """Whether `x` was added for another weight: then not for the one of this `name`, unless it comes again."""
        if self.last is x and name not in self.came:
            self.came.add(name)
            return True
        self.last, self.came = x, {name}
        return False


class Listener:
    """Sums both factors of a layer's weights while it runs back. Gradients at padding are 0."""

    def __init__(
        self,
        layer: Layer,
        module: nn.Module,
        device: Device,
        floor: float = 0.0,
        rounding: int = 0,
        inputs_alone: bool = False,
        neurons: bool = False,
    ) -> None:
        """`floor`: what every token of an embedding counts for at least (see embedding.py).

        `rounding`: find what few bits would cost as well, so many numbers to a scale, of all but embeddings.
        `inputs_alone`: sum inputs while the layer runs forward, which is all it does. `neurons`: sum what is to be
        known where neurons of the layer's MLPs may go.
        """
        self.layer, self.device, self.floor, self.inputs_alone = layer, device, floor, inputs_alone
        self.mask: Tensor | None = None  # of the tokens [B, T] that run, 1 where one counts, for `inputs_alone`
        self.sums: dict[str, list[Sums]] = {}  # one per copy of the weight
        self.stacks: list[_Experts] = []
        self.hooks: list[Any] = []
        self._of_group: dict[str, _Shared] = {}
        self.called: set[str] = set()  # weights whose modules the forward pass calls
        self._summed = False
        stacks: dict[str, list[Weight]] = {}
        in_mlps = {name for mlp in layer.neurons for name in mlp.weights} if neurons else set()
        self.wholes: dict[str, Whole] = {}  # of the weights in MLPs, once `close` has made them
        for weight in layer.weights:
            name = relative(weight, layer)
            W = dense(module, name, weight.kind)
            if weight.kind == "experts":
                self.sums[weight.name] = [Sums(one, rounding=rounding) for one in W]
                stacks.setdefault(module_of(name, weight.kind), []).append(weight)
                continue
            sums = (
                Sums(W.T, True)
                if weight.kind == "embedding"
                else Sums(W, rounding=rounding, both=weight.name in in_mlps)
            )
            self.sums[weight.name] = [sums]
            hook = self._embedding(weight.name, sums) if sums.embedding else self._one(weight, sums)
            self.hooks.append(module.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        for name, weights in stacks.items():
            stack = module.get_submodule(name)
            inside = {weight.name.rpartition(".")[2]: self.sums[weight.name] for weight in weights}
            self.stacks.append(_Experts(stack, inside))
            names = [weight.name for weight in weights]
            self.hooks.append(stack.register_forward_hook(self._experts(names, self.stacks[-1]), with_kwargs=True))

    def _one(self, weight: Weight, sums: Sums) -> Any:
        shared = self._shared(weight, sums) if self.inputs_alone else None

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.called.add(weight.name)
            x = next(iter((*args, *kwargs.values())))
            if shared and shared.has(x, weight.name):
                return
            Wx = _product(module, out) if sums.wide else None
            if self.inputs_alone:
                sums.count_inputs(counted(x, self.mask), None if Wx is None else counted(Wx, self.mask))
            else:
                self._at(out, lambda gradient: sums.add(_rows(x), gradient, None if Wx is None else _rows(Wx)))

        return hook

    def _shared(self, weight: Weight, sums: Sums) -> _Shared | None:
        """What tall weights of one group have in common, whose inputs are the same tensors: one sum; else None."""
        if sums.wide or weight.group is None:
            return None
        shared = self._of_group.setdefault(weight.group, _Shared(sums))
        sums.inputs, sums.counted = shared.sums.inputs, shared.sums.counted
        return shared

    def _embedding(self, name: str, sums: Sums) -> Any:
        """Vectors as the table has them, and the gradients at these: before the module scales them, say."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.called.add(name)
            ids: Tensor = next(iter((*args, *kwargs.values())))

            def add(gradient: Tensor) -> None:
                rows = F.embedding(ids, module.weight.detach())
                if not is_plain_embedding(module):
                    with torch.enable_grad():
                        made = around(module, ids, rows.requires_grad_(True))
                    gradient = torch.autograd.grad(made, rows, gradient.view(made.shape).to(made.dtype))[0]
                sums.add(_rows(rows), _rows(gradient))

            self._at(out, add)

        return hook

    def _experts(self, names: list[str], experts: _Experts) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.called.update(names)
            given = experts.layout.given(experts.experts, args, kwargs)
            hidden, index, weights = (one.detach() for one in given)
            if self.inputs_alone:
                keep = kept_rows(self.mask, len(hidden), experts.experts if experts.layout.sorted else 1)
                experts.count_inputs(hidden[keep], index[keep])
            else:
                self._at(out, lambda gradient: experts.add(hidden, index, weights, gradient))

        return hook

    def _at(self, out: Tensor, add: Any) -> None:
        """Hand the gradient at `out` to `add`, as rows."""
        # What an encoder's keys and values are made of does not depend on the layer's input.
        source = out if out.requires_grad else out.requires_grad_(True)

        def listen(gradient: Tensor) -> None:
            with self.device.autocast():
                add(_rows(gradient))

        source.register_hook(listen)

    def stop(self) -> None:
        """Listen no longer."""
        for hook in self.hooks:
            hook.remove()

    @property
    def of_inputs(self) -> list[Tensor]:
        """What was summed over inputs alone, of every copy of every weight; may be added to."""
        return [tensor for sums in self.sums.values() for one in sums for tensor in one.of_inputs]

    def sum_up(self) -> None:
        """Add up what the processes of the run have seen, once; before anything is made of it."""
        if self._summed or ranks.world() == 1:
            return
        self._summed = True
        every = [one for sums in self.sums.values() for one in sums]
        ranks.sum_(matrix for one in every for matrix in one.matrices)
        numbers = ranks.summed([number for one in every for number in one.numbers])
        for i, one in enumerate(every):
            one.numbers = numbers[4 * i : 4 * i + 4]

    def tied(self, tokens: int) -> dict[str, Tensor]:
        """What a head in this layer adds to the output factor of the embedding it is tied to, by its name."""
        self.sum_up()
        heads = ((weight.tied, self.sums[weight.name][0]) for weight in self.layer.weights)
        return {name: sums.factors(tokens)[0] * (sums.length.item() / tokens) for name, sums in heads if name}

    def close(self, tokens: int, tied: Mapping[str, Tensor] | None = None) -> dict[str, FisherFactors]:
        """The factors and the spectrum of every weight of its own, by name, `tokens` predicted.

        `tied`: that of a head. Factors of experts are stacked. They get the same rank, so their spectra are added. A
        weight that no prediction depends on in a way that gradients show (it is never called, or it chooses what others
        read) is left out, with a warning: nothing says what its errors would cost.
        """
        self.stop()
        self.sum_up()
        with self.device.autocast():
            for experts in self.stacks:
                experts.close()
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        problems: dict[str, list[Problem]] = {}
        rounding: dict[str, Tensor | None] = {}
        for weight in observable(self.layer):
            sums = self.sums.pop(weight.name)
            if not any(one.calls for one in sums):
                if ranks.is_first():
                    log.warning("%s stays dense: %s", weight.name, BLIND if weight.name in self.called else UNCALLED)
                continue
            if weight.kind == "embedding":
                sums[0].count_every_token(self.floor)
            factors[weight.name] = [one.factors(tokens, (tied or {}).get(weight.name)) for one in sums]
            refuse_unless_finite(weight.name, *(matrix for both in factors[weight.name] for matrix in both))
            if len(sums[0].larger):
                larger = sums[0].larger_factor(tokens)
                refuse_unless_finite(weight.name, larger)
                self.wholes[weight.name] = whole_of(sums[0].W, factors[weight.name][0], larger)
            problems[weight.name] = [(one.W, *both) for one, both in zip(sums, factors[weight.name])]
            costs = [one.cost(tokens) for one in sums if one.rounding]
            rounding[weight.name] = torch.tensor([sum(costs)]) if costs else None
        spectra = _spectra(problems, factorising(self.device.device))
        found = {}
        for weight in (one for one in observable(self.layer) if one.name in factors):
            H, G = (torch.stack(each) if weight.kind == "experts" else each[0] for each in zip(*factors[weight.name]))
            found[weight.name] = FisherFactors(H, G, spectra[weight.name], rounding[weight.name])
        return found


def _spectra(problems: Mapping[str, list[Problem]], place: torch.device) -> dict[str, Tensor]:
    """The spectrum of every weight, summed over its copies; the processes of the run share the copies out."""
    tasks = [(name, problem) for name, each in problems.items() for problem in each]
    spectra = {
        name: torch.zeros(min(each[0][0].shape), dtype=torch.float64, device=place) for name, each in problems.items()
    }
    own = shares.own_of(tasks, [min(one[0].shape) ** 3 for _, one in tasks])

    def find(task: tuple[str, Problem]) -> Tensor:
        return fisher_spectrum(*(tensor.to(place) for tensor in task[1]))

    for (name, _), found in zip(own, side_by_side(find, own, place, max(map(len, spectra.values()), default=0))):
        spectra[name] += found
    ranks.sum_(spectra.values())
    return spectra


class _Experts:
    """One module of fused experts: what each of them saw, and the gradients inside of it."""

    def __init__(self, module: Any, sums: dict[str, list[Sums]]) -> None:
        self.module, self.sums = module, sums
        self.layout = layout_of(module)
        self.experts = len(self.layout.weight(module, "down"))
        self.sample = TokenSample()

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """Count a batch: hidden T x H, the K experts chosen per token and their weights, the gradient at the output."""
        self.sample.add(hidden[(index < self.experts).any(dim=-1)])
        for expert in range(self.experts):
            token, choice = torch.where(index == expert)
            if len(token):
                # The module's output is the sum of the experts' own, each times its weight.
                self._expert(expert, hidden[token], gradient[token] * weights[token, choice, None])

    def count_inputs(self, hidden: Tensor, index: Tensor) -> None:
        """Count what a batch gives the experts chosen, without gradients."""
        for expert in range(self.experts):
            token, _ = torch.where(index == expert)
            if len(token):
                self._expert(expert, hidden[token], None)

    def _expert(self, expert: int, x: Tensor, gradient: Tensor | None, borrowed: bool = False) -> None:
        """Count the inputs of one expert and the gradients at its output, or inputs alone; `borrowed`: not its own."""
        layout, module = self.layout, self.module
        W = {name: layout.weight(module, name)[expert] for name in layout.projections}
        biases = {name: layout.bias(module, name) for name in layout.projections}

        def linear(name: str, rows: Tensor) -> Tensor:
            bias = biases[name]
            return F.linear(rows, W[name], None if bias is None else bias[expert]).requires_grad_(True)

        x = x.to(W["up"].dtype)
        with torch.enable_grad():
            entries = {name: linear(name, x) for name in layout.entries}
            inner = layout.activated(module, entries)
        seen = {**dict.fromkeys(entries, x), "down": inner.detach()}
        if gradient is None:
            for name, sums in self.sums.items():
                count = sums[expert].borrow_inputs if borrowed else sums[expert].count_inputs
                count(seen[name])
            return
        if layout.normed:
            with torch.enable_grad():
                out = linear("down", inner.detach())
                normed = layout.finished(module, out)
            gradient = torch.autograd.grad(normed, out, gradient.to(normed.dtype))[0]
        below = F.linear(gradient.to(W["down"].dtype), W["down"].T)
        at = dict(zip(entries, torch.autograd.grad(inner, [*entries.values()], below.to(inner.dtype))))
        for name, sums in self.sums.items():
            sums[expert].add(seen[name], gradient if name == "down" else at[name])

    def close(self) -> None:
        """Let experts that saw few tokens borrow from those of the whole layer."""
        sample = self.sample.take(self.layout.weight(self.module, "down").device)
        if sample is None:  # the module was never called, which whoever asks for its factors says
            return
        for expert in range(self.experts):
            if any(int(sums[expert].rows) < len(sums[expert].inputs) for sums in self.sums.values()):
                self._expert(expert, sample, None, borrowed=True)


def _product(module: nn.Module, out: Tensor) -> Tensor | None:
    """W x of what a linear layer put out, which saves making it again; None where that is not known."""
    if type(module) is not nn.Linear:
        return None
    out = out.detach()
    return out if module.bias is None else out - module.bias.detach()


def _rows(t: Tensor) -> Tensor:
    return t.detach().reshape(-1, t.shape[-1])
