"""Gram matrices of the inputs of weights, H = sum of x x^T, or of their outputs, sum of (W x)(W x)^T.

Inputs are shared by a group of weights, and one matrix serves them all. Where a weight is alone in its group and d_out
is smaller than d_in, an initialiser that takes either gets the Gram of the outputs: it says as much about the best
rank-r map (DESIGN 6) in d_out^2 numbers. Experts have one matrix each, of the tokens routed to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.base import ranks
from lillama.contract import Weight
from lillama.dense.experts import layout_of
from lillama.errors import LillamaError
from lillama.factorise.known import Known, TokenSample, WeightStatistics, refuse_unless_finite
from lillama.lowrank.swap import module_of
from lillama.pretrained.calls import Batch

GRAMS = frozenset(("gram", "output_gram", "cross"))


def choose_gram(weight: Weight, weights: Sequence[Weight], wanted: Iterable[str]) -> str:
    """The Gram ("gram" or "output_gram") that an initialiser which names `wanted` gets for one of `weights`."""
    choices = set(wanted) & GRAMS
    if len(choices) == 1:
        return choices.pop()
    alone = sum((w.group or w.name) == (weight.group or weight.name) for w in weights) == 1
    return "output_gram" if alone and weight.shape[0] < weight.shape[1] else "gram"


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The activations [..., d] of the positions whose mask is not 0, as rows in float32."""
    x = x.detach()
    if mask is not None and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    return x.reshape(-1, x.shape[-1]).float()


def kept_rows(mask: Tensor | None, rows: int, copies: int) -> Tensor | slice:
    """Which of `rows` tokens (or the tokens `copies` times, once for each expert) the mask [B, T] lets count."""
    if mask is None or mask.numel() * copies != rows:
        return slice(None)
    return mask.reshape(-1).bool().repeat(copies)


class Grams:
    """Accumulates the Gram matrices of a layer's weights while the layer runs.

    Sums are float32 at least, autocast off: rounded to bfloat16 they would not be positive definite.
    Positions whose mask is 0 do not count.
    """

    def __init__(
        self,
        layer_name: str,
        module: nn.Module,
        weights: Sequence[Weight],
        limit: int,
        wanted: Iterable[str] = ("gram",),
    ) -> None:
        """`limit`: how many tokens are enough; `wanted`: the Grams that the initialiser names."""
        self.limit, self.tokens = limit, 0
        self._mask: Tensor | None = None
        self._counts = True  # rows that stand in for none add nothing
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._keys: dict[str, tuple[str, str]] = {}  # weight -> (argument, what the sum is kept under)
        self._hooks = []
        self._experts: list[_Experts] = []
        stacks: dict[str, list[Weight]] = {}
        for weight in weights:
            if weight.kind == "embedding":  # its inputs are token counts (see embedding.py)
                continue
            argument = choose_gram(weight, weights, wanted)
            name = module_of(weight.name, weight.kind)
            submodule = module.get_submodule(name.removeprefix(layer_name).removeprefix("."))
            if weight.kind == "experts":
                stacks.setdefault(name, []).append(weight)
                continue
            key = (argument, weight.name if argument == "output_gram" else weight.group or weight.name)
            if key not in self._keys.values():
                listen = self._on_output if argument == "output_gram" else self._on_input
                self._hooks.append(listen(submodule, key))
            self._keys[weight.name] = key
        for name, stack in stacks.items():
            submodule = module.get_submodule(name.removeprefix(f"{layer_name}."))
            experts = _Experts(submodule, {w.name: choose_gram(w, weights, wanted) for w in stack})
            self._experts.append(experts)
            self._hooks.append(submodule.register_forward_pre_hook(self._on_experts(experts), with_kwargs=True))
        self.module = module

    def _on_input(self, module: nn.Module, key: tuple[str, str]) -> Any:
        return module.register_forward_pre_hook(lambda _, args: self._add(key, args[0]))

    def _on_output(self, module: nn.Module, key: tuple[str, str]) -> Any:
        def listen(module: nn.Module, _: Any, out: Tensor) -> None:
            bias = getattr(module, "bias", None)
            self._add(key, out if bias is None else out - bias)

        return module.register_forward_hook(listen)

    def _add(self, key: tuple[str, str], x: Tensor) -> None:
        x = counted(x, self._mask)
        x = x if self._counts else x[:0]
        with torch.autocast(x.device.type, enabled=False):
            gram = x.T @ x
            self._sums[key] = self._sums[key].add_(gram) if key in self._sums else gram

    def _on_experts(self, experts: _Experts) -> Any:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, _weights = experts.layout.given(experts.experts, args, kwargs)
            hidden = hidden.detach()
            copies = experts.experts if experts.layout.sorted else 1  # the tokens once for each expert
            keep = kept_rows(self._mask, len(hidden), copies)
            hidden, index = hidden[keep], index[keep]
            if not self._counts:
                hidden, index = hidden[:0], index[:0]
            experts.add(hidden, index)

        return listen

    @torch.no_grad()
    def add(self, batches: Iterable[Batch], stream: Iterable[Tensor], position: int) -> Grams:
        """Run the layer over a stream until `limit` tokens were seen."""
        seen = 0
        for batch, hidden in zip(batches, stream):
            if seen >= self.limit:
                break
            self._mask, self._counts = batch.calls[position].mask, batch.counts
            batch.calls[position](self.module, hidden)
            seen += batch.tokens
        self.tokens += seen
        return self

    @torch.no_grad()
    def close(self) -> Known:
        """Stop listening; for every weight the matrix found, under the argument it is meant for.

        Raises LillamaError for one that is not finite.
        """
        for hook in self._hooks:
            hook.remove()
        ranks.sum_(self._sums[key] for key in sorted(self._sums))
        # Of a module that the forward pass never calls nothing is known.
        seen = {name: key for name, key in self._keys.items() if key in self._sums}
        found: Known = {name: WeightStatistics(**{key[0]: self._sums[key]}) for name, key in seen.items()}
        for experts in self._experts:
            found |= experts.close()
        for name, about in found.items():
            refuse_unless_finite(name, *about.known().values())
        return found


class _Experts:
    """The Gram matrices of one module of fused experts.

    An expert that saw fewer tokens than its matrix has rows borrows: as many more, in weight, from the tokens of the
    whole layer, run through its own weights.
    """

    def __init__(self, module: nn.Module, arguments: dict[str, str]) -> None:
        self.module, self.arguments = module, arguments
        self.layout = layout_of(module)
        self.experts = len(self.layout.weight(module, "down"))
        self.tokens = [0] * self.experts
        self._sums: dict[str, list[Tensor | None]] = {}
        self._sample = TokenSample(rows=True)

    def add(self, hidden: Tensor, index: Tensor) -> None:
        """Count a batch: hidden T x H, the experts chosen for its tokens T x K."""
        self._sample.add(hidden[(index < self.experts).any(dim=-1)])
        for expert in range(self.experts):
            x = hidden[(index == expert).any(dim=-1)]
            self.tokens[expert] += len(x)
            if len(x):
                self._count(expert, x, dict.fromkeys(self._keys().values(), 1.0))

    def _count(self, expert: int, x: Tensor, shares: dict[str, float]) -> None:
        """Add the matrices named in `shares`, each times its share."""
        with torch.autocast(x.device.type, enabled=False):
            for key, y in self._observed(expert, x, set(shares)).items():
                sums = self._sums.setdefault(key, [None] * self.experts)
                old, gram = sums[expert], y.T @ y
                sums[expert] = gram * shares[key] if old is None else old.add_(gram, alpha=shares[key])

    def _keys(self) -> dict[str, str]:
        """What each weight's sum is kept under: gate and up see the same input."""
        kinds = {name: name.rpartition(".")[2] for name in self.arguments}
        return {
            name: f"{kinds[name]} output" if argument == "output_gram" else "down" if kinds[name] == "down" else "in"
            for name, argument in self.arguments.items()
        }

    def _observed(self, expert: int, x: Tensor, wanted: set[str]) -> dict[str, Tensor]:
        """The rows whose Gram matrices are `wanted`, in float32, from the inputs of one expert."""
        layout, module = self.layout, self.module
        weights = {n: layout.weight(module, n)[expert] for n in layout.projections}
        biases = {n: layout.bias(module, n) for n in layout.projections}

        def linear(name: str, rows: Tensor) -> Tensor:
            return F.linear(rows.to(weights[name].dtype), weights[name])

        def biased(name: str, y: Tensor) -> Tensor:
            bias = biases[name]
            return y if bias is None else y + bias[expert]

        found = {"in": x}
        if wanted - {"in"}:
            found |= {f"{name} output": linear(name, x) for name in layout.entries}
            entries = {name: biased(name, found[f"{name} output"]) for name in layout.entries}
            found["down"] = layout.activated(module, entries)
            if "down output" in wanted:
                found["down output"] = linear("down", found["down"])
        return {key: found[key].float() for key in wanted}

    def close(self) -> Known:
        """The matrices, one per expert stacked, the prior added."""
        sample = self._sample.take(self.layout.weight(self.module, "down").device)
        if sample is not None:
            self._sum_up(sample)
        if sample is None:
            raise LillamaError("no token reached the experts", where="calibration", hint="Give more, unmasked tokens.")
        for expert, tokens in enumerate(self.tokens):
            few = {key: (n - tokens) / len(sample) for key, n in self._rows().items() if tokens < n}
            if few:
                self._count(expert, sample, few)
        stacked = {key: torch.stack([s for s in sums if s is not None]) for key, sums in self._sums.items()}
        self._sums = {}
        return {name: WeightStatistics(**{self.arguments[name]: stacked[key]}) for name, key in self._keys().items()}

    def _sum_up(self, like: Tensor) -> None:
        """Add up what the processes of the run have seen."""
        if ranks.world() == 1:
            return
        self.tokens = [round(count) for count in ranks.summed(self.tokens)]
        for key, size in self._rows().items():
            sums = self._sums.setdefault(key, [None] * self.experts)
            whole = [torch.zeros(size, size, device=like.device) if one is None else one for one in sums]
            ranks.sum_(whole)
            self._sums[key] = [*whole]

    def _rows(self) -> dict[str, int]:
        """The size of every matrix that is wanted."""
        _, hidden, inner = self.layout.weight(self.module, "down").shape
        sizes = {"in": hidden, "down": inner, "gate output": inner, "up output": inner, "down output": hidden}
        return {key: sizes[key] for key in self._keys().values()}
