"""Low-rank experts of a standalone checkpoint (see carried.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lillama.checkpoint.carried import KINDS, How, LowRankModule
from lillama.dense.between import Between
from lillama.lowrank.arithmetic import Products
from lillama.lowrank.grouped import all_at_once, is_eager, one_by_one


class LowRankExperts(LowRankModule):
    """Experts whose projections are dense or of low rank, each for itself."""

    def __init__(self, dense: Any, how: How) -> None:
        super().__init__()
        self.between = Between(**{**how["between"], "arguments": tuple(how["between"]["arguments"])})
        self.config = dense.config if hasattr(dense, "config") else None
        down: Tensor = dense.down_proj
        options: dict[str, Any] = {"device": down.device, "dtype": down.dtype}
        self.num_experts = len(down)
        for name in self.between.projections:
            one = how["projections"][name]
            if "rank" in one:
                self.add_matrix(f"{name}_", one, options)
            else:
                self.register_parameter(f"{name}_W", nn.Parameter(torch.empty(*one["shape"], **options)))
            if self.between.biased:
                bias = torch.empty(*one["shape"][:-1], **options)
                self.register_parameter(f"{name}_bias", nn.Parameter(bias))
        dense._parameters.clear()
        for name, child in dense.named_children():  # an activation, a norm
            self.add_module(name, child)
        self.dense = [dense]  # it knows the gate; in a list, where no search for modules finds it

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weights = self.between.given(self.num_experts, args, kwargs)
        through = one_by_one if is_eager(self.config) else all_at_once
        return through(hidden, index, weights, self.num_experts, self.of_rows)

    def of_rows(self, x: Tensor, products: Products, expert: int | Tensor, side_by_side: bool) -> Tensor:
        """What rows x get from the experts that compute them."""
        module, between = self.dense[0], self.between
        entries = {name: self.through(name, x, products, expert) for name in between.entries}
        inner = between.activated(module, entries, side_by_side)
        return between.finished(module, self.through("down", inner, products, expert))

    def through(self, name: str, x: Tensor, products: Products, expert: int | Tensor) -> Tensor:
        """A projection of rows x."""
        if f"{name}_" in self.storages:
            y = self.multiplied(f"{name}_", x, products)
        else:
            y = products.linear(x, getattr(self, f"{name}_W"))
        return y + getattr(self, f"{name}_bias")[expert].to(y.dtype) if self.between.biased else y


KINDS["experts"] = LowRankExperts
