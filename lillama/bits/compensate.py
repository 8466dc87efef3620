"""Rounding in which what one number loses is made up for by those that are not rounded yet (GPTQ, arXiv 2210.17323).

The rounded W^ is to lose little of tr(G (W - W^) H (W - W^)^T). Columns are rounded from the first to the last; the
error of each is spread over the columns behind it as the inverse of H says. Groups along the columns get their scales
when their turn comes, of what their numbers are by then. In the same way rows make up for rows, as the inverse of G
says (both sides: YAQA, arXiv 2505.22988), some rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lillama.factorise.rounding import spreading
from lillama.lowrank.coded import find_scales, round_to, spread

OUTPUT_DAMPING = 1.0  # of G's mean diagonal: known from few tokens, and at 0.1 it was fitted to them (results/bits.md)
BLOCK = 128  # columns whose errors are spread over the others together; a multiple of every group
ROWS = 64  # that are rounded together, as if they had nothing to do with each other


def round_compensated(W: Tensor, H: Tensor, bits: int, group: int, G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of W [n, k] by H [k, k] and, unless rows are each for themselves, G [n, n].

    They are as `round_nearest` gives them.
    """
    W = W.detach().float()
    by_inputs = spreading(H).to(W)
    if G is None or len(W) <= ROWS:
        return _round_rows(W, H, by_inputs, bits, group)
    # Neighbours, such as the rows of one head, matter to each other most: they come into different blocks.
    blocks = -(-len(W) // ROWS)
    order = torch.cat([torch.arange(first, len(W), blocks) for first in range(blocks)]).to(W.device)
    over = spreading(G[order][:, order], OUTPUT_DAMPING).to(W)
    wanted, found, start = W[order], [], 0
    for first in range(blocks):
        stop = start + len(range(first, len(W), blocks))
        rows = wanted[start:stop]
        found.append(_round_rows(rows, H, by_inputs, bits, group))
        lost = rows - found[-1][0] * spread(found[-1][1], group, W.shape[1])
        lost = torch.linalg.solve_triangular(over[start:stop, start:stop].T, lost, upper=False)
        wanted[stop:] -= over[start:stop, stop:].T @ lost
        start = stop
    back = order.argsort()
    codes, scales = (torch.cat(parts)[back] for parts in zip(*found))
    return codes, scales


def _round_rows(W: Tensor, H: Tensor, spread_by: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of rows that do not make up for each other; `spread_by` is `spreading` of H."""
    # Column by column, in which order they are visited; a copy, though W may lie so already.
    left = W.T.clone(memory_format=torch.contiguous_format)
    columns, shares = len(left), (1 / spread_by.diagonal().double()).tolist()  # a device is waited for once
    codes, scales = torch.empty_like(left), []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, lost = left[start:stop], torch.empty_like(left[start:stop])
        here = spread_by[start:stop, start:stop]
        for column in range(stop - start):
            if column % group == 0:
                scales.append(find_scales(block[column : column + group].T, bits, group))
                scale = scales[-1][:, 0]
            number = block[column]
            code = round_to(number, scale, bits)
            codes[start + column] = code
            torch.mul((number - code * scale), shares[start + column], out=lost[column])
            block[column + 1 :].addr_(here[column, column + 1 :], lost[column], alpha=-1)
        left[stop:] -= spread_by[start:stop, stop:].T @ lost
    codes = codes.T.contiguous()
    return codes, refit_scales(W, codes, torch.cat(scales, 1), H, group)


def refit_scales(W: Tensor, codes: Tensor, scales: Tensor, H: Tensor, group: int) -> Tensor:
    """The scales after every group of columns, in its turn, got those that suit its codes best by H, the others given.

    Of a row the loss is quadratic in the scale of a group: with D its codes and R = (W - W^) H, it falls most by a
    change of D R^T / (D H D^T). A change that does not help, once it is a bfloat16 number, is left out, and one of more
    than half the scale: where no input tells anything of a group both products are rounding's, and so is their ratio.
    """
    H, W, scales = H.to(codes), W.to(codes), scales.clone()
    left = (W - codes * spread(scales, group, codes.shape[1])) @ H
    for number, start in enumerate(range(0, codes.shape[1], group)):
        own = slice(start, start + group)
        D = codes[:, own]
        gain, cost = (D * left[:, own]).sum(1), ((D @ H[own, own]) * D).sum(1)
        scale = scales[:, number]
        better = (scale + gain / cost.clamp_min(torch.finfo(cost.dtype).tiny)).bfloat16().to(scale)
        change = better - scale
        good = (change * (change * cost - 2 * gain) < 0) & (change.abs() <= scale.abs() / 2)
        change = torch.where(good, change, torch.zeros_like(change))
        scales[:, number] += change
        left -= (change[:, None] * D) @ H[own]
    return scales
