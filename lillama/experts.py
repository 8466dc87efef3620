"""Low-rank experts: a whole module of fused experts with each of its projections dense or in factors.

Written against transformers' convention for fused experts: parameters `gate_up_proj` (E x 2I x H, gate first) and
`down_proj` (E x H x I), an `act_fn`, and `forward(hidden (T x H), top_k_index (T x K), top_k_weights (T x K))` that
`config._experts_implementation` runs expert by expert ("eager") or as grouped matrix products (anything else).

The weights of a plan are named `<module>.gate`, `<module>.up` and `<module>.down`; the tensors
`<module>.gate_A` (E x d_out x r), `<module>.gate_B` (E x r x d_in), or `<module>.gate_W` where it stays dense. These
names do not meet the patterns by which transformers fuses and splits experts (DESIGN 9).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.errors import LillamaError

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
        # What to_dense() fills again: the module without its numbers, hidden in a list from the search for modules.
        hollow = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in dense.parameters()}
        self._hollow = [copy.deepcopy(dense, {**hollow, id(dense.config): dense.config})]
        for name in PROJECTIONS:
            weight = dense_weight(dense, name)
            # Halves of the fused parameter would keep the whole of it in memory.
            kept = weight if name == "down" else weight.clone(memory_format=torch.contiguous_format)
            self.register_parameter(f"{name}_W", nn.Parameter(kept, requires_grad=False))

    def factorise(self, projection: str, rank: int, device: Any = None) -> None:
        """Put empty factors of rank `rank` in place of a dense projection."""
        W = getattr(self, f"{projection}_W")
        E, d_out, d_in = W.shape
        delattr(self, f"{projection}_W")
        options = {"device": device or W.device, "dtype": W.dtype}
        self.register_parameter(f"{projection}_A", nn.Parameter(torch.empty(E, d_out, rank, **options)))
        self.register_parameter(f"{projection}_B", nn.Parameter(torch.empty(E, rank, d_in, **options)))
        self.ranks[projection] = rank

    def set_factors(self, projection: str, A: Tensor, B: Tensor) -> None:
        """Take over A (E x d_out x r) and B (E x r x d_in), cast to this module's dtype."""
        with torch.no_grad():
            getattr(self, f"{projection}_A").copy_(A)
            getattr(self, f"{projection}_B").copy_(B)

    def weight(self, projection: str) -> Tensor:
        """A projection as one matrix per expert, E x d_out x d_in."""
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
        if projection in self.ranks:
            return [getattr(self, f"{projection}_B"), getattr(self, f"{projection}_A")]
        return [getattr(self, f"{projection}_W")]

    def _expert(self, projection: str, expert: int, x: Tensor) -> Tensor:
        for stage in self._stages(projection):
            x = F.linear(x, stage[expert])
        return x

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
        for stage in self._stages(projection):
            x = grouped_linear(x, stage, ends)
        return x

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}={self.ranks.get(name, 'dense')}" for name in PROJECTIONS)
        return f"experts={self.num_experts}, {ranks}"


def grouped_linear(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """x[start:end] @ W[e]^T for every expert e, its rows of x ending at ends[e]; in the type autocast asks for."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W = x.to(dtype), W.to(dtype)
    else:
        x = x.to(W.dtype)
    if _has_kernel(x, W):
        return _Grouped.apply(x, W, ends)
    start, rows = 0, []
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows.append(F.linear(x[start:end], W[expert]))
        start = end
    if start < len(x):
        rows.append(x.new_zeros(len(x) - start, W.shape[1]))
    return torch.cat(rows)


class _Grouped(torch.autograd.Function):
    """torch's grouped product; its own backward refuses a gradient that is an expanded view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, ends)
        return F.grouped_mm(x, W.transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, W, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = F.grouped_mm(gradient, W, offs=ends) if ctx.needs_input_grad[0] else None
        to_W = F.grouped_mm(gradient.T, x, offs=ends) if ctx.needs_input_grad[1] else None
        return to_x, to_W, None


def _has_kernel(x: Tensor, W: Tensor) -> bool:
    """Whether torch's grouped product serves: it wants strides (and starts) of whole 16 bytes."""
    if not hasattr(F, "grouped_mm") or x.device.type not in ("cpu", "cuda"):
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    size = W.element_size()
    aligned = all(n * size % 16 == 0 for n in W.shape[1:]) and W.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.is_contiguous() and W.is_contiguous()
