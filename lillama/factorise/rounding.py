"""What rounding the numbers of a dense weight would cost the model's predictions, foretold without rounding it.

Compensated rounding (bits/compensate.py) goes through the columns of W; what one loses, those behind it make up for as
far as the inputs let them. What nobody can make up for is the share of input j that later inputs do not tell: its
variance d_j given these, 1 / U_jj^2 with U the Cholesky factor by which rounding goes. The error of a number is as if
drawn evenly from one step D_ij wide, of variance D_ij^2 / 12, and errors of different rows have nothing to do with each
other. So the cost is about 1/2 sum_i G_ii sum_j d_j D_ij^2 / 12 nats per token. How near that comes to the truth is in
docs/results/bits.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lillama.contract import Weight
from lillama.lowrank.coded import find_scales, spread

DAMPING = 0.01  # of H's mean diagonal: directions that no input was seen in do not swing
WIDEST = 2048  # inputs that are compared with each other; those further apart count as unrelated
BITS = 4  # that the cost is foretold for


def spreading(H: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor of the inverse of H, damped: how the error of an input is spread over later ones.

    `damping` is a share of the mean diagonal.
    """
    H = H.double()
    n = len(H)
    one = torch.eye(n, dtype=H.dtype, device=H.device)
    H = H + one * (damping * H.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)


def cuts(width: int) -> list[slice]:
    """The inputs of a weight in runs of at most WIDEST."""
    return [slice(start, min(start + WIDEST, width)) for start in range(0, width, WIDEST)]


def kept_numbers(weight: Weight) -> int:
    """Numbers of Gram matrices that are kept of a weight for this, besides those on its smaller side."""
    d_out, d_in = weight.shape
    if weight.kind == "embedding" or d_out > d_in:
        return 0
    return weight.copies * sum((run.stop - run.start) ** 2 for run in cuts(d_in))


def dense_cost(W: Tensor, grams: Sequence[Tensor], outputs: Tensor, group: int) -> float:
    """Nats per token that W (d_out x d_in) loses in 4 bits, `group` numbers to a scale.

    `grams` are H of its inputs, a run of `cuts` each; `outputs` [d_out] the diagonal of G.
    """
    unknown = torch.cat([1 / spreading(H).diagonal().square() for H in grams])
    steps = spread(find_scales(W.float(), BITS, group), group, W.shape[1])
    return float(outputs.double() @ (steps.square() @ unknown.to(steps)).double()) / 24
