"""One product per expert, all in one call: torch's grouped product, and what stands in where it cannot serve."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.lowrank.arithmetic import Products
from lillama.lowrank.coded import Coded
from lillama.lowrank.permute import Permute

OfRows = Callable[[Tensor, Products, "int | Tensor", bool], Tensor]
"""(rows, products with one matrix per expert, the expert of all rows or of each, whether entries go on side by side)
-> what the experts make of the rows."""


def is_eager(config: Any) -> bool:
    """Whether a model's configuration asks for its experts one by one."""
    return getattr(config, "_experts_implementation", "eager") in ("eager", None)


def one_by_one(hidden: Tensor, index: Tensor, weights: Tensor, experts: int, of_rows: OfRows) -> Tensor:
    """What experts put out for hidden states (T x H), chosen experts (T x K) and their weights (T x K)."""
    out = torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= experts:  # a choice that another process computes
            continue
        # Choice by choice, then by token: the order in which the dense module adds up.
        choice, token = torch.where(index.T.eq(expert))
        y = of_rows(hidden[token], products_of_one(expert), expert, True)
        out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
    return out


def all_at_once(hidden: Tensor, index: Tensor, weights: Tensor, experts: int, of_rows: OfRows) -> Tensor:
    """The same as grouped products."""
    choices = index.shape[-1]
    chosen, order = torch.sort(index.reshape(-1))
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=hidden.device)
    counts.index_add_(0, chosen.clamp(max=experts), torch.ones_like(chosen, dtype=torch.int32))
    products = grouped_products(counts[:-1].cumsum(0, dtype=torch.int32))
    # Rows behind the last expert's are not written by the kernel.
    elsewhere = (chosen >= experts)[:, None]
    written = Products(lambda *given: products.linear(*given).masked_fill(elsewhere, 0.0), products.permute)
    x = hidden[order // choices].masked_fill(elsewhere, 0.0)
    y = of_rows(x, written, chosen.clamp(max=experts - 1), False)
    y = y.masked_fill(elsewhere, 0.0) * weights.reshape(-1)[order, None]
    y = y[order.argsort()].view(hidden.shape[0], choices, -1).sum(dim=1)
    return y.to(hidden.dtype)


def products_of_one(expert: int) -> Products:
    """Products with the matrices of one expert, out of stacked ones."""
    return Products(
        lambda x, W, bias=None: F.linear(x, W[expert], bias),
        lambda y, order, inverse: Permute.apply(y, order[expert], inverse[expert]),
    )


def grouped_products(ends: Tensor) -> Products:
    """Products of rows that are sorted by expert, those of expert e ending at ends[e], each with its own matrix."""
    return Products(
        lambda x, W, bias=None: grouped_linear(x, W, ends),
        lambda y, order, inverse: _grouped_permute(y, order, inverse, ends),
    )


def grouped_linear(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """x[start:end] @ W[e]^T for every expert e, its rows of x ending at ends[e]; in the type autocast asks for."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W = x.to(dtype), W if isinstance(W, Coded) else W.to(dtype)
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


def _grouped_permute(y: Tensor, order: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
    """The columns of y[start:end] in the order of every expert."""
    bounds = [0, *ends.tolist()]
    rows = [
        Permute.apply(y[start:end], order[expert], inverse[expert])
        for expert, (start, end) in enumerate(itertools.pairwise(bounds))
        if end > start
    ]
    return torch.cat([*rows, y[bounds[-1] :]])


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
    """Whether torch's grouped product serves: it wants strides (and starts) of whole 16 bytes, and no float64.

    Of few bits it would want all experts whole at once.
    """
    if (
        isinstance(W, Coded)
        or W.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or not hasattr(F, "grouped_mm")
        or x.device.type not in ("cpu", "cuda")
    ):
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    size = W.element_size()
    aligned = all(n * size % 16 == 0 for n in W.shape[1:]) and W.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.is_contiguous() and W.is_contiguous()
