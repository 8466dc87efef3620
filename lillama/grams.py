"""Gram matrices H = sum of x x^T of the inputs of weights, one per group of weights with a common input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lillama.contract import Weight
from lillama.streams import Batch


class Grams:
    """Accumulates the Gram matrices of a layer's weights while the layer runs.

    Sums are float32 at least, autocast off: rounded to bfloat16 they would not be positive definite.
    Positions whose mask is 0 do not count.
    """

    def __init__(self, layer_name: str, module: nn.Module, weights: Sequence[Weight], limit: int) -> None:
        """`limit`: how many tokens are enough."""
        self.limit, self.tokens = limit, 0
        self._mask: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._groups = {w.name: w.group or w.name for w in weights}
        self._hooks = []
        for group in dict.fromkeys(self._groups.values()):
            first = next(w for w in weights if self._groups[w.name] == group)
            submodule = module.get_submodule(first.name.removeprefix(f"{layer_name}."))
            self._hooks.append(submodule.register_forward_pre_hook(self._hook(group)))
        self.module = module

    def _hook(self, group: str) -> Any:
        def accumulate(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            with torch.autocast(x.device.type, enabled=False):
                if self._mask is not None and self._mask.shape == x.shape[:-1]:
                    x = x[self._mask.bool()]
                x = x.reshape(-1, x.shape[-1]).float()
                gram = x.T @ x
                self._sums[group] = self._sums[group] + gram if group in self._sums else gram

        return accumulate

    @torch.no_grad()
    def add(self, batches: Iterable[Batch], stream: Iterable[Tensor], position: int) -> Grams:
        """Run the layer over a stream until `limit` tokens were seen."""
        seen = 0
        for batch, hidden in zip(batches, stream):
            if seen >= self.limit:
                break
            self._mask = batch.mask
            batch.calls[position](self.module, hidden)
            seen += batch.tokens
        self.tokens += seen
        return self

    def close(self) -> dict[str, Tensor]:
        """Stop listening; the Gram matrix of every weight, by its name."""
        for hook in self._hooks:
            hook.remove()
        return {name: self._sums[group] for name, group in self._groups.items()}
