"""Low-rank experts: a whole module of fused experts with each of its projections dense or in factors.

What a dense module of experts looks like, and what it computes between its projections, lillama/dense/experts.py finds
(`Layout`); this module computes the same, expert by expert ("eager" in `config._experts_implementation`) or as grouped
matrix products (anything else).

The weights of a plan are named `<module>.gate` (where there is a gate), `<module>.up` and `<module>.down`; the tensors
`<module>.gate_A` (E x d_out x r), `<module>.gate_B` (E x r x d_in), or `<module>.gate_W` where it stays dense, with
`<module>.gate_bias` (E x d_out) where experts have biases. These names do not meet the patterns by which transformers
fuses and splits experts (DESIGN 9). In another storage its suffixes follow the projection's name (`gate_B`, `gate_C`,
`gate_pivots`), the expert in front of every shape.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lillama.dense.experts import FUSED, experts_layout, layout_of
from lillama.lowrank.arithmetic import Products
from lillama.lowrank.grouped import all_at_once, is_eager, one_by_one
from lillama.lowrank.module import FactorModule, Matrix
from lillama.lowrank.storage import Factors, Storage, Tensors


def is_fused(module: Any) -> bool:
    """Whether `module` holds fused experts that can be served."""
    return experts_layout(module) is not None


class LowRankExperts(FactorModule):
    """Experts whose projections are dense (`gate_W`) or of low rank, each for itself and in a storage of its own."""

    kind = "experts"
    dense_parameters = (*FUSED, *(f"{name}_bias" for name in FUSED))

    def __init__(self, dense: Any) -> None:
        """Take over the weights of `dense`; `factorise` then makes them smaller, one projection at a time."""
        super().__init__()
        self.layout = layout_of(dense)
        self.num_experts: int = len(dense.down_proj)
        self.config = getattr(dense, "config", None)
        self._matrices: dict[str, Matrix] = {}
        # An activation or a norm may have parameters: it is a part of this module, under its own name.
        children = dict(dense.named_children())
        for name, child in children.items():
            self.add_module(name, child)
        # What to_dense() fills again, and what knows the gate: the dense module without its numbers, hidden in a list
        # from the search for modules. The parts are these, not copies.
        own = dense.named_parameters(recurse=False)
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for _, p in own}
        memo |= {id(kept): kept for kept in (*children.values(), self.config)}
        self._hollow = [copy.deepcopy(dense, memo)]
        for name in self.layout.projections:
            weight, bias = self.layout.weight(dense, name), self.layout.bias(dense, name)
            # Parts of a fused parameter would keep the whole of it in memory.
            kept = weight if name == "down" and weight.is_contiguous() else _of_its_own(weight)
            self.register_parameter(f"{name}_W", nn.Parameter(kept, requires_grad=False))
            if bias is not None:
                self.register_parameter(f"{name}_bias", nn.Parameter(_of_its_own(bias), requires_grad=False))

    def matrices(self) -> dict[str, Matrix]:
        return self._matrices

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the projections that are not dense."""
        return {projection: matrix.rank for projection, matrix in self._matrices.items()}

    def factorise(self, projection: str, storage: Storage, rank: int, device: Any = None) -> None:
        """Put empty tensors of rank `rank` in place of a dense projection."""
        W = getattr(self, f"{projection}_W")
        delattr(self, f"{projection}_W")
        matrix = Matrix(f"{projection}_", storage, rank, tuple(W.shape))
        matrix.register_empty(self, {"device": device or W.device, "dtype": W.dtype})
        self._matrices[projection] = matrix

    def set_factors(self, projection: str, A: Tensor, B: Tensor) -> None:
        """Take over A (E x d_out x r) and B (E x r x d_in), cast to this module's dtype."""
        self._matrices[projection].set_factors(self, A, B)

    def factors(self, projection: str) -> Factors:
        """A (E x d_out x r) and B (E x r x d_in) of a projection."""
        return self._matrices[projection].factors(self)

    def store_as(self, projection: str, storage: Storage, tensors: Tensors | None = None) -> None:
        """Keep a projection in another storage: the same up to rounding, or what its stacked `tensors` hold."""
        old = self._matrices[projection]
        first = getattr(self, old.prefix + old.storage.parameters[0])
        tensors, options = tensors or old.in_storage(self, storage), {"device": first.device, "dtype": first.dtype}
        old.remove(self)
        new = self._matrices[projection] = Matrix(old.prefix, storage, old.rank, old.shape)
        new.register_empty(self, options)
        new.put(self, tensors)

    def weight(self, projection: str) -> Tensor:
        """A projection as one matrix per expert, E x d_out x d_in."""
        if projection in self._matrices:
            return self._matrices[projection].product(self)
        dense: Tensor = getattr(self, f"{projection}_W")
        return dense

    @classmethod
    def markers(cls) -> dict[str, Tensor]:
        # Of three dimensions, so that the fused parameter it stands for can still be split as the hub's format does.
        return {"down_proj": torch.empty(1, 0, 0)}

    def to_dense(self) -> nn.Module:
        """The fused module that computes what this one computes."""
        dense: Any = copy.copy(self._hollow[0])
        dense._parameters, dense._modules = dict(dense._parameters), dict(self._modules)
        names = self.layout.projections
        with torch.no_grad():
            weights = {name: self.weight(name) for name in names}
            biases = {name: getattr(self, f"{name}_bias") for name in names} if self.layout.biased else {}
            for name, tensor in self.layout.fused(weights, biases):
                dense._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        return dense

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the dense module puts out, called as it is called."""
        hidden, index, weights = self.layout.given(self.num_experts, args, kwargs)
        through = one_by_one if is_eager(self.config) else all_at_once
        return through(hidden, index, weights, self.num_experts, self._of_rows)

    def _through(self, projection: str, x: Tensor, products: Products, expert: int | Tensor) -> Tensor:
        """A projection of x; `products` multiply by one matrix per expert, `expert` is that of all rows or of each."""
        matrix = self._matrices.get(projection)
        if matrix is None:
            y = products.linear(x, getattr(self, f"{projection}_W"))
        else:
            y = matrix.storage.multiply(x, matrix.tensors(self), matrix.derived(self), products)
        return y + getattr(self, f"{projection}_bias")[expert].to(y.dtype) if self.layout.biased else y

    def _of_rows(self, x: Tensor, products: Products, expert: int | Tensor, side_by_side: bool) -> Tensor:
        """What rows x get from the experts that compute them."""
        module, layout = self._hollow[0], self.layout
        entries = {name: self._through(name, x, products, expert) for name in layout.entries}
        inner = layout.activated(module, entries, side_by_side)
        return layout.finished(module, self._through("down", inner, products, expert))

    def extra_repr(self) -> str:
        said = {name: f"{m.rank} ({m.storage.name})" for name, m in self._matrices.items()}
        ranks = ", ".join(f"{name}={said.get(name, 'dense')}" for name in self.layout.projections)
        return f"experts={self.num_experts}, {ranks}"


def _of_its_own(part: Tensor) -> Tensor:
    """A copy that is contiguous."""
    return part.clone(memory_format=torch.contiguous_format)
