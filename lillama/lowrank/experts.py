"""Low-rank experts: a whole module of fused experts with each of its projections dense or in factors.

Written against transformers' convention for fused experts: parameters `gate_up_proj` (E x 2I x H, gate first) and
`down_proj` (E x H x I), an `act_fn`, and `forward(hidden (T x H), top_k_index (T x K), top_k_weights (T x K))` that
`config._experts_implementation` runs expert by expert ("eager") or as grouped matrix products (anything else).

The weights of a plan are named `<module>.gate`, `<module>.up` and `<module>.down`; the tensors
`<module>.gate_A` (E x d_out x r), `<module>.gate_B` (E x r x d_in), or `<module>.gate_W` where it stays dense. These
names do not meet the patterns by which transformers fuses and splits experts (DESIGN 9). In another storage its
suffixes follow the projection's name (`gate_B`, `gate_C`, `gate_pivots`), the expert in front of every shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lillama.errors import LillamaError
from lillama.lowrank.grouped import grouped_products, products_of_one
from lillama.lowrank.module import FactorModule, Matrix
from lillama.lowrank.storage import Factors, Products, Storage

PROJECTIONS = ("gate", "up", "down")


def is_fused(module: Any) -> bool:
    """Whether `module` holds fused experts in the one layout that is served here."""
    shapes = [tuple(getattr(getattr(module, name, None), "shape", ())) for name in ("gate_up_proj", "down_proj")]
    plain = not any(getattr(module, name, False) for name in ("is_transposed", "has_bias", "has_post_expert_norm"))
    usual = getattr(module, "is_concatenated", True) and getattr(module, "has_gate", True)
    return (
        [len(shape) for shape in shapes] == [3, 3]
        and plain
        and usual
        and shapes[0][1:] == (2 * shapes[1][-1], shapes[1][1])
    )


def dense_weight(module: Any, projection: str) -> Tensor:
    """One projection of dense experts, E x d_out x d_in (a view)."""
    if projection == "down":
        down: Tensor = module.down_proj.detach()
        return down
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
    return gate if projection == "gate" else up


def replaced_parameters(projections: Iterable[str]) -> list[str]:
    """The fused parameters of which nothing is left when `projections` become factors."""
    chosen = set(projections)
    return [n for n, of in (("gate_up_proj", {"gate", "up"}), ("down_proj", {"down"})) if of <= chosen]


class LowRankExperts(FactorModule):
    """Experts whose projections are dense (`gate_W`) or of low rank, each for itself and in a storage of its own."""

    kind = "experts"
    dense_parameters = ("gate_up_proj", "down_proj")
    act_fn: Any

    def __init__(self, dense: Any) -> None:
        """Take over the weights of `dense`; `factorise` then makes them smaller, one projection at a time."""
        super().__init__()
        if not is_fused(dense):
            raise LillamaError(f"{type(dense).__name__} holds no experts of a layout that is known here")
        self.num_experts: int = dense.gate_up_proj.shape[0]
        self.act_fn, self.config = dense.act_fn, dense.config
        self._matrices: dict[str, Matrix] = {}
        # What to_dense() fills again: the module without its numbers, hidden in a list from the search for modules.
        hollow = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in dense.parameters()}
        self._hollow = [copy.deepcopy(dense, {**hollow, id(dense.config): dense.config})]
        for name in PROJECTIONS:
            weight = dense_weight(dense, name)
            # Halves of the fused parameter would keep the whole of it in memory.
            kept = weight if name == "down" else weight.clone(memory_format=torch.contiguous_format)
            self.register_parameter(f"{name}_W", nn.Parameter(kept, requires_grad=False))

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

    def store_as(self, projection: str, storage: Storage) -> None:
        """Keep a projection in another storage."""
        old = self._matrices[projection]
        first = getattr(self, old.prefix + old.storage.parameters[0])
        factors, options = old.factors(self), {"device": first.device, "dtype": first.dtype}
        old.remove(self)
        new = self._matrices[projection] = Matrix(old.prefix, storage, old.rank, old.shape)
        new.register_empty(self, options)
        new.set_factors(self, *factors)

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
        dense._parameters = dict(dense._parameters)
        with torch.no_grad():
            fused = torch.cat([self.weight("gate"), self.weight("up")], dim=1)
            dense._parameters["gate_up_proj"] = nn.Parameter(fused, requires_grad=False)
            dense._parameters["down_proj"] = nn.Parameter(self.weight("down"), requires_grad=False)
        return dense

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """T x H from T x H, as the router's K choices per token say."""
        eager = getattr(self.config, "_experts_implementation", "eager") in ("eager", None)
        return (self._eager if eager else self._grouped)(hidden_states, top_k_index, top_k_weights)

    def _through(self, projection: str, x: Tensor, products: Products) -> Tensor:
        """A projection of x; `products` multiply by one matrix per expert."""
        matrix = self._matrices.get(projection)
        if matrix is None:
            return products.linear(x, getattr(self, f"{projection}_W"))
        return matrix.storage.multiply(x, matrix.tensors(self), matrix.derived(self), products)

    def _eager(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index).tolist():
            if expert >= self.num_experts:  # a choice that another process computes
                continue
            # Choice by choice, then by token: the order in which the dense module adds up.
            choice, token = torch.where(index.T.eq(expert))
            x, products = hidden[token], products_of_one(expert)
            # Side by side, as the fused product leaves them: an activation of a contiguous half may round otherwise.
            fused = torch.cat([self._through("gate", x, products), self._through("up", x, products)], dim=-1)
            gate, up = fused.chunk(2, dim=-1)
            y = self._through("down", self.act_fn(gate) * up, products) * weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _grouped(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        choices = index.shape[-1]
        chosen, order = torch.sort(index.reshape(-1))
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=hidden.device)
        counts.index_add_(0, chosen.clamp(max=self.num_experts), torch.ones_like(chosen, dtype=torch.int32))
        products = grouped_products(counts[:-1].cumsum(0, dtype=torch.int32))
        elsewhere = (chosen >= self.num_experts)[:, None]
        x = hidden[order // choices].masked_fill(elsewhere, 0.0)
        y = self.act_fn(self._through("gate", x, products)) * self._through("up", x, products)
        # Rows behind the last expert's are not written by the kernel.
        y = self._through("down", y.masked_fill(elsewhere, 0.0), products).masked_fill(elsewhere, 0.0)
        y = y * weights.reshape(-1)[order, None]
        y = y[order.argsort()].view(hidden.shape[0], choices, -1).sum(dim=1)
        return y.to(hidden.dtype)

    def extra_repr(self) -> str:
        said = {name: f"{m.rank} ({m.storage.name})" for name, m in self._matrices.items()}
        ranks = ", ".join(f"{name}={said.get(name, 'dense')}" for name in PROJECTIONS)
        return f"experts={self.num_experts}, {ranks}"
