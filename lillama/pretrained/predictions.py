"""How far a model's predictions are from labels and from another model's, a few rows of logits at a time.

A vocabulary is wide: the logits of 512 tokens are 100 MB in float32, and every step of a loss written with whole
tensors takes as much again, fresh from the system. In chunks of rows the same takes a few MB, and the gradient is made
on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20  # logits at once: 4 MB, which a cache holds


def divergence(logits: Tensor, labels: Tensor, teacher: Tensor | None = None, share: float = 0.0) -> Tensor:
    """(1 - share) cross entropy + share KL(teacher || logits), summed over rows; float32.

    logits and `teacher` N x V, labels N. Without `teacher` the second term is left out. Computed in float32, the
    gradient has the type of `logits`.
    """
    loss: Tensor = _Divergence.apply(logits, labels, teacher, share)
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | None, share: float) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=logits.device)
        step = max(CHUNK // logits.shape[1], 1)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            label = labels[rows, None]
            log_p = logits[rows].float().log_softmax(-1)
            if share < 1:
                loss -= (1 - share) * log_p.gather(1, label).sum()
            wanted = None
            if teacher is not None and share > 0:
                log_wanted = teacher[rows].float().log_softmax(-1)
                wanted = log_wanted.exp()
                loss += share * (log_wanted.sub_(log_p).mul_(wanted)).sum()
            if gradient is not None:
                p = log_p.exp_()
                if wanted is None:
                    p.mul_(1 - share)
                else:
                    p.sub_(wanted, alpha=share)
                p.scatter_add_(1, label, torch.full_like(label, share - 1, dtype=p.dtype))
                gradient[rows] = p
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token per row of logits N x V, by its predicted chance; `generator` is of the device where the logits are."""
    step = max(CHUNK // logits.shape[1], 1)
    chances = (part.float().softmax(-1) for part in logits.detach().split(step))
    return torch.cat([torch.multinomial(each, 1, generator=generator)[:, 0] for each in chances])
