"""Rounding in which what one number loses is made up for by those that are not rounded yet (GPTQ, arXiv 2210.17323).

The rounded W^ is to lose little of tr((W - W^) H (W - W^)^T). Columns are rounded from the first to the last; the error
of each is spread over the columns behind it as the inverse of H says. Groups along the columns get their scales when
their turn comes, of what their numbers are by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lillama.factorise.rounding import spreading
from lillama.lowrank.coded import find_scales, round_to, spread

BLOCK = 128  # columns whose errors are spread over the others together; a multiple of every group


def round_compensated(W: Tensor, H: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of W [n, k] by H [k, k], as `round_nearest` gives them."""
    # Column by column, in which order they are visited; a copy, though W may lie so already.
    left = W.detach().float().T.clone(memory_format=torch.contiguous_format)
    spread_by = spreading(H).to(left)
    columns = len(left)
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
            torch.mul((number - code * scale), 1 / float(here[column, column]), out=lost[column])
            block[column + 1 :].addr_(here[column, column + 1 :], lost[column], alpha=-1)
        left[stop:] -= spread_by[start:stop, stop:].T @ lost
    codes = codes.T.contiguous()
    return codes, refit_scales(W, codes, torch.cat(scales, 1), H, group)


def refit_scales(W: Tensor, codes: Tensor, scales: Tensor, H: Tensor, group: int) -> Tensor:
    """The scales after every group of columns, in its turn, got those that suit its codes best by H, the others given.

    Of a row the loss is quadratic in the scale of a group: with D its codes and R = (W - W^) H, it falls most by a
    change of D R^T / (D H D^T). A change that does not help, once it is a bfloat16 number, is left out.
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
        good = (change * (change * cost - 2 * gain) < 0) & better.isfinite() & (better != 0)
        change = torch.where(good, change, torch.zeros_like(change))
        scales[:, number] += change
        left -= (change[:, None] * D) @ H[own]
    return scales
