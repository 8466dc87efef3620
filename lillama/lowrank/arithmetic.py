"""What the built-in storages compute, on plain tensors: torch alone, so that standalone checkpoints can carry this.

A storage (storage.py) says which tensors there are and calls these; `lillama export --standalone` copies the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.lowrank.permute import Permute

Orders = tuple[Tensor, Tensor]


class Products(NamedTuple):
    """The two things a format may do with its inputs, for one matrix or for one matrix per expert.

    `linear(x, W[, bias])` is x W^T; `permute(y, order, inverse)` puts the columns of y in another order.
    """

    linear: Callable[..., Tensor]
    permute: Callable[..., Tensor]


def permuted(y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The columns of y in another order; what `Permute` is for costs time where no gradient comes back."""
    if y.requires_grad:
        reordered: Tensor = Permute.apply(y, order, inverse)
        return reordered
    if y.dtype == torch.float32 and y.device.type == "cpu":
        return y.index_select(-1, order)
    return y.gather(-1, order.expand_as(y))


ONE_MATRIX = Products(F.linear, permuted)
TALL = 2  # rows for each column from which that pays
IN_PLACE = 8  # rows from which products written in place save more than they cost


def multiply_factors(x: Tensor, A: Tensor, B: Tensor, products: Products, bias: Tensor | None = None) -> Tensor:
    """A B x + bias for inputs x [..., d_in]."""
    return products.linear(products.linear(x, B), A, bias)


def lay_out(linears: Iterable[nn.Module], others: Iterable[nn.Module]) -> None:
    """Keep the tall matrices of `linears` column by column in memory, but those that `others` have as well.

    A product with one row, as every new token asks for, then reads them up to 1.6 times as fast (MKL, float32). Shapes
    and numbers stay; what saves a model writes them row by row.
    """
    kept = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for module in linears:
        for weight in module.parameters(recurse=False):
            if weight.dim() == 2 and weight.dtype == torch.float32 and weight.device.type == "cpu":
                tall = len(weight) >= TALL * weight.shape[1]
                if tall and id(weight) not in kept and weight.is_contiguous():
                    weight.data = weight.detach().t().contiguous().t()


def look_up_factors(ids: Tensor, A: Tensor, B: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` of A B; as a dense table's under autocast, where the residual stream begins, in full precision."""
    return F.linear(F.embedding(ids, A, padding_idx), B.T).to(B.dtype)


def pivoted_orders(pivots: Tensor, others: int) -> Orders:
    """(order, inverse) [d_out] each: cat(pivot rows, others)[order] is the output in its own order."""
    is_pivot = torch.zeros(pivots.shape[0] + others, dtype=torch.uint8, device=pivots.device)
    is_pivot = is_pivot.index_fill(0, pivots, 1)
    # A stable sort leaves the others in rising order; its shape is known beforehand, which a compiler needs.
    inverse = torch.cat([pivots, is_pivot.argsort(stable=True)[:others]])
    return inverse.argsort(), inverse


def multiply_pivoted(
    x: Tensor, B: Tensor, C: Tensor, orders: Orders, products: Products, bias: Tensor | None = None
) -> Tensor:
    """The same for pivot rows B and the coefficients C of the other rows in them."""
    if products is ONE_MATRIX and _writes_in_place(x, B, C):
        return _written_in_place(x, B, C, orders[0], bias)
    pivots = products.linear(x, B)
    others = [products.linear(pivots, C)] if C.shape[-2] else []
    y = products.permute(torch.cat([pivots, *others], -1), *orders)
    return y if bias is None else y + bias


def _writes_in_place(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the products may go where they belong at once: many rows, no gradient, nobody who traces or casts."""
    return (
        type(B) in (Tensor, nn.Parameter)
        and type(C) in (Tensor, nn.Parameter)
        and x.numel() >= IN_PLACE * x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == B.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or B.requires_grad or C.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
    )


def _written_in_place(x: Tensor, B: Tensor, C: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    """The same numbers without a copy of pivots and others beside each other."""
    rank, rows = len(B), x.reshape(-1, x.shape[-1])
    both = x.new_empty(len(rows), rank + len(C))
    pivots = both[:, :rank]
    torch.mm(rows, B.t(), out=pivots)
    if len(C):
        torch.mm(pivots, C.t(), out=both[:, rank:])
    y = both.index_select(-1, order)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def product_pivoted(B: Tensor, C: Tensor, orders: Orders) -> Tensor:
    """The matrix that pivot rows and coefficients stand for; a stack of them for stacked ones."""
    rows = torch.cat([B, C @ B], dim=-2)
    return rows.gather(-2, orders[0][..., None].expand_as(rows))


def look_up_pivoted(ids: Tensor, B: Tensor, C: Tensor, orders: Orders) -> Tensor:
    """Rows `ids` of that matrix."""
    rank, place = len(B), orders[0][ids]
    pivots = F.embedding(place.clamp(max=rank - 1), B)
    if not len(C):
        return pivots
    others = F.linear(F.embedding((place - rank).clamp(min=0), C), B.T)
    return torch.where((place < rank)[..., None], pivots, others.to(pivots.dtype))
