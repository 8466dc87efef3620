"""Objectives compare a layer's outputs; losses say which inputs the student is compared on.

An objective is a function (student, teacher) -> distance of every token: both [..., D] in float32, the result
[...]. A loss is a function whose parameters name the distances it wants, `on_teacher` and/or
`on_student` (scalars: means over tokens), so its signature also says which streams must run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.base import ranks


def l1_logcos(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/D) |y - y'|_1 - log sigmoid(cos(y, y')) (eq. 7)."""
    distance = (student - teacher).abs().mean(-1)
    return distance - F.logsigmoid(F.cosine_similarity(student, teacher, dim=-1))


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/D) |y - y'|_2^2."""
    return (student - teacher).square().mean(-1)


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|y - y'|_2^2 / |y|_2^2, so that tokens with massive activations do not own the mean."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-6)


def teacher(on_teacher: Tensor) -> Tensor:
    """The student fed the teacher's activations (eq. 8): layers learn independently."""
    return on_teacher


def student(on_student: Tensor) -> Tensor:
    """The student fed the activations of the students below it (eq. 9), detached between layers."""
    return on_student


def teacher_student(on_teacher: Tensor, on_student: Tensor) -> Tensor:
    """Their sum (eq. 10)."""
    return on_teacher + on_student


def token_mean(distance: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens; where `mask` (same shape, or broadcastable) is 0 a token is padding and does not count."""
    if mask is None:
        return distance.mean()
    mask = mask.to(distance.dtype)
    mask = mask.reshape(*mask.shape, *[1] * (distance.dim() - mask.dim())).expand_as(distance)
    return (distance * mask).sum() / mask.sum().clamp_min(1)


def of_all_rows(distances: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The distances of a whole batch, of which every process has the means over its rows, a `share` of what counts.

    Numbers are those of all rows, whatever a loss makes of them; gradients are this process's part of the whole.
    """
    if ranks.world() == 1:
        return distances
    own = {name: distance * share for name, distance in distances.items()}
    whole = torch.stack([distance.detach().float() for distance in own.values()])
    ranks.sum_([whole])
    return {name: distance + (total - distance.detach()) for (name, distance), total in zip(own.items(), whole)}
