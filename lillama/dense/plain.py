"""Linears and embeddings: where their matrix is, and whether their own forward does more than multiply or look up.

A subclass with a forward of its own is never taken for the plain one. A linear is served if a copy computes W x + b;
an embedding also if what it does comes after the look-up (`super().forward(ids) * self.embed_scale`): then its forward
can run around another look-up (`around`).
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.dense.probe import apart, filled, once, own_forward, same, twin

TRIED = 7  # rows of the copy that is tried


def is_conv1d(module: Any) -> bool:
    """Whether `module` is transformers' Conv1D: a linear whose weight is kept as d_in x d_out."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)  # not loaded: there is none
    return conv1d is not None and isinstance(module, conv1d)


def matrix(module: Any) -> Tensor:
    """The matrix of a linear (d_out x d_in) or an embedding (vocabulary x width), detached."""
    weight: Tensor = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes W x + b and nothing else."""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not _owns_its_matrix(module):
        return False
    plain = [nn.Linear.forward, *(base.__dict__.get("forward") for base in type(module).__mro__ if _is_conv1d(base))]
    if type(module).forward in plain:
        return True
    answer: bool = once("linear", module, lambda: _multiplies(module))
    return answer


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` looks vectors up, and does what else it does with these alone."""
    if not isinstance(module, nn.Embedding) or not _owns_its_matrix(module) or module.max_norm is not None:
        return False
    if is_plain_embedding(module):
        return True
    answer: bool = once("embedding", module, lambda: _looks_up(module))
    return answer


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether an embedding looks vectors up and does nothing else."""
    return type(module).forward is nn.Embedding.forward


def around(module: nn.Embedding, ids: Tensor, rows: Tensor) -> Tensor:
    """What the own forward of an embedding makes of `rows` in place of the vectors it would look up for `ids`."""
    if is_plain_embedding(module):
        return rows
    stand_in: Any = copy.copy(module)
    cls: Any = type(module)
    stand_in.__class__ = _answering(cls)
    stand_in.__dict__["answer"] = rows
    out: Tensor = own_forward(module)(stand_in, ids)
    return out


class _Answer(nn.Embedding):
    """Stands between a subclass of nn.Embedding and nn.Embedding."""

    answer: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return self.answer


@functools.cache
def _answering(cls: Any) -> type:
    return type(cls.__name__, (cls, _Answer), {})


def _is_conv1d(cls: type) -> bool:
    return cls is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _owns_its_matrix(module: nn.Module) -> bool:
    """Whether its weight is a parameter of two dimensions (and not made of others, as weight norms make it)."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _multiplies(module: nn.Module) -> bool:
    with apart():
        try:
            copied = twin(module, {})
            x = torch.randn(2, TRIED, matrix(copied).shape[1], generator=torch.Generator().manual_seed(1))
            found = own_forward(module)(copied, x)
            return same(found, F.linear(x, matrix(copied), getattr(copied, "bias", None)))
        except Exception:  # whatever another one's code raises: this is no plain linear
            return False


def _looks_up(module: nn.Module) -> bool:
    shape = tuple(matrix(module).shape)
    with apart():
        try:
            one, other = (twin(module, {"weight": filled(shape, seed)}) for seed in (1, 2))
            ids = torch.randint(0, shape[0], (2, TRIED), generator=torch.Generator().manual_seed(1))
            found = own_forward(module)(one, ids)
            # Its matrix must count through the look-up alone: the other copy has another one.
            return same(found, around(other, ids, F.embedding(ids, matrix(one)))) and found.shape[:2] == ids.shape
        except Exception:  # whatever another one's code raises: this is no embedding that is known
            return False
