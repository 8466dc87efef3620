"""Low-rank experts: a whole module of fused experts with each of its projections dense or in factors.

Written against transformers' convention for fused experts: parameters `gate_up_proj` (E x 2I x H, gate first) and
`down_proj` (E x H x I), an `act_fn`, and `forward(hidden (T x H), top_k_index (T x K), top_k_weights (T x K))` that
`config._experts_implementation` runs expert by expert ("eager") or as grouped matrix products (anything else).

The weights of a plan are named `<module>.gate`, `<module>.up` and `<module>.down`; the tensors
`<module>.gate_A` (E x d_out x r), `<module>.gate_B` (E x r x d_in), or `<module>.gate_W` where it stays dense. These
names do not meet the patterns by which transformers fuses and splits experts (DESIGN 9). In pivoted storage they are
`gate_B` (pivot rows), `gate_C` (coefficients of the others) and `gate_pivots` (see lowrank.py), one set per expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.errors import LillamaError
from lillama.lowrank.grouped import _grouped_permute, grouped_linear
from lillama.lowrank.pivot import Permute, orders, pivoted, unpivoted

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


class LowRankExperts(nn.Module):
    """Experts whose projections are dense (`gate_W`) or factors (`gate_A`, `gate_B`), each for itself."""

    act_fn: Any

    def __init__(self, dense: Any) -> None:
        """Take over the weights of `dense`; `factorise` then makes them smaller, one projection at a time."""
        super().__init__()
        if not is_fused(dense):
            raise LillamaError(f"{type(dense).__name__} holds no experts of a layout that is known here")
        self.num_experts: int = dense.gate_up_proj.shape[0]
        self.act_fn, self.config = dense.act_fn, dense.config
        self.ranks: dict[str, int] = {}
        self._orders: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # derived from pivots on first use
        # What to_dense() fills again: the module without its numbers, hidden in a list from the search for modules.
        hollow = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in dense.parameters()}
        self._hollow = [copy.deepcopy(dense, {**hollow, id(dense.config): dense.config})]
        for name in PROJECTIONS:
            weight = dense_weight(dense, name)
            # Halves of the fused parameter would keep the whole of it in memory.
            kept = weight if name == "down" else weight.clone(memory_format=torch.contiguous_format)
            self.register_parameter(f"{name}_W", nn.Parameter(kept, requires_grad=False))

    def factorise(self, projection: str, rank: int, storage: str = "factors", device: Any = None) -> None:
        """Put empty factors of rank `rank` in place of a dense projection."""
        W = getattr(self, f"{projection}_W")
        delattr(self, f"{projection}_W")
        self.ranks[projection] = rank
        self._empty(projection, storage, W.shape, {"device": device or W.device, "dtype": W.dtype})

    def _empty(self, projection: str, storage: str, shape: Sequence[int], options: dict[str, Any]) -> None:
        (E, d_out, d_in), rank = shape, self.ranks[projection]
        shapes = {"A": (E, d_out, rank), "B": (E, rank, d_in)}
        if storage == "pivoted":
            shapes = {"B": (E, rank, d_in), "C": (E, d_out - rank, rank)}
            pivots = torch.arange(rank, device=options["device"]).repeat(E, 1)
            self.register_buffer(f"{projection}_pivots", pivots)
        for letter, size in shapes.items():
            self.register_parameter(f"{projection}_{letter}", nn.Parameter(torch.empty(size, **options)))

    def is_pivoted(self, projection: str) -> bool:
        """Whether a projection is kept as pivot rows and coefficients."""
        return hasattr(self, f"{projection}_C")

    def set_factors(self, projection: str, A: Tensor, B: Tensor) -> None:
        """Take over A (E x d_out x r) and B (E x r x d_in), cast to this module's dtype."""
        given: dict[str, Any] = {"A": A, "B": B}
        if self.is_pivoted(projection):
            each = [pivoted(*both) for both in zip(A, B)]
            given = {letter: torch.stack(found) for letter, found in zip(("pivots", "B", "C"), zip(*each))}
        with torch.no_grad():
            for letter, value in given.items():
                getattr(self, f"{projection}_{letter}").copy_(value)
        self._orders.pop(projection, None)

    def factors(self, projection: str) -> tuple[Tensor, Tensor]:
        """A (E x d_out x r) and B (E x r x d_in) of a projection, balanced and in float64 where it was pivoted."""
        B = getattr(self, f"{projection}_B")
        if not self.is_pivoted(projection):
            return getattr(self, f"{projection}_A"), B
        each = [unpivoted(*one) for one in zip(B, getattr(self, f"{projection}_C"), self._order(projection)[0])]
        A, B = (torch.stack(found) for found in zip(*each))
        return A, B

    def store_as(self, projection: str, storage: str) -> None:
        """Keep a projection in another storage."""
        if self.is_pivoted(projection) == (storage == "pivoted"):
            return
        A, B = self.factors(projection)
        old = getattr(self, f"{projection}_B")
        for letter in ("A", "B", "C", "pivots"):
            if hasattr(self, f"{projection}_{letter}"):
                delattr(self, f"{projection}_{letter}")
        shape = (A.shape[0], A.shape[1], B.shape[2])
        self._empty(projection, storage, shape, {"device": old.device, "dtype": old.dtype})
        self.set_factors(projection, A, B)

    def _order(self, projection: str) -> tuple[Tensor, Tensor]:
        """`orders` of every expert, E x d_out each."""
        pivots, C = getattr(self, f"{projection}_pivots"), getattr(self, f"{projection}_C")
        if projection not in self._orders or self._orders[projection][2] is not pivots:
            each = [orders(one, pivots.shape[1] + C.shape[1]) for one in pivots]
            order, inverse = (torch.stack(found) for found in zip(*each))
            self._orders[projection] = order, inverse, pivots
        return self._orders[projection][:2]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._orders = {}  # the pivots were overwritten in place

    def weight(self, projection: str) -> Tensor:
        """A projection as one matrix per expert, E x d_out x d_in."""
        if self.is_pivoted(projection):
            B = getattr(self, f"{projection}_B")
            rows = torch.cat([B, getattr(self, f"{projection}_C") @ B], dim=1)
            return rows.gather(1, self._order(projection)[0][..., None].expand_as(rows))
        if projection in self.ranks:
            product: Tensor = getattr(self, f"{projection}_A") @ getattr(self, f"{projection}_B")
            return product
        dense: Tensor = getattr(self, f"{projection}_W")
        return dense

    def to_dense(self) -> nn.Module:
        """The fused module that computes what this one computes."""
        dense = copy.copy(self._hollow[0])
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

    def _stages(self, projection: str) -> list[Tensor]:
        """The matrices a projection multiplies by, in turn."""
        letters = "W" if projection not in self.ranks else "BC" if self.is_pivoted(projection) else "BA"
        return [getattr(self, f"{projection}_{letter}") for letter in letters]

    def _through(self, projection: str, x: Tensor, linear: Any, permute: Any) -> Tensor:
        """A projection of x; `linear` multiplies by one matrix per expert, `permute` puts outputs in order."""
        if not self.is_pivoted(projection):
            for stage in self._stages(projection):
                x = linear(x, stage)
            return x
        rows, coefficients = self._stages(projection)
        x = linear(x, rows)
        others = [linear(x, coefficients)] if coefficients.shape[1] else []
        out: Tensor = permute(torch.cat([x, *others], -1), *self._order(projection))
        return out

    def _expert(self, projection: str, expert: int, x: Tensor) -> Tensor:
        return self._through(
            projection,
            x,
            lambda x, W: F.linear(x, W[expert]),
            lambda y, order, inverse: Permute.apply(y, order[expert], inverse[expert]),
        )

    def _eager(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index).tolist():
            if expert >= self.num_experts:  # a choice that another process computes
                continue
            # Choice by choice, then by token: the order in which the dense module adds up.
            choice, token = torch.where(index.T.eq(expert))
            x = hidden[token]
            # Side by side, as the fused product leaves them: an activation of a contiguous half may round otherwise.
            fused = torch.cat([self._expert("gate", expert, x), self._expert("up", expert, x)], dim=-1)
            gate, up = fused.chunk(2, dim=-1)
            y = self._expert("down", expert, self.act_fn(gate) * up) * weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _grouped(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        choices = index.shape[-1]
        chosen, order = torch.sort(index.reshape(-1))
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=hidden.device)
        counts.index_add_(0, chosen.clamp(max=self.num_experts), torch.ones_like(chosen, dtype=torch.int32))
        ends = counts[:-1].cumsum(0, dtype=torch.int32)
        elsewhere = (chosen >= self.num_experts)[:, None]
        x = hidden[order // choices].masked_fill(elsewhere, 0.0)
        y = self.act_fn(self._all("gate", x, ends)) * self._all("up", x, ends)
        # Rows behind the last expert's are not written by the kernel.
        y = self._all("down", y.masked_fill(elsewhere, 0.0), ends).masked_fill(elsewhere, 0.0)
        y = y * weights.reshape(-1)[order, None]
        y = y[order.argsort()].view(hidden.shape[0], choices, -1).sum(dim=1)
        return y.to(hidden.dtype)

    def _all(self, projection: str, x: Tensor, ends: Tensor) -> Tensor:
        return self._through(
            projection,
            x,
            lambda x, W: grouped_linear(x, W, ends),
            lambda y, order, inverse: _grouped_permute(y, order, inverse, ends),
        )

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}={self.ranks.get(name, 'dense')}" for name in PROJECTIONS)
        return f"experts={self.num_experts}, {ranks}"
