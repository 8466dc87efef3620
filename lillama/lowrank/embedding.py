"""Modules of one low-rank table of token vectors, as two factors or as pivot rows and coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.lowrank.linear import PivotedLinear, _Factors


class LowRankEmbedding(_Factors):
    """A table of token vectors kept as A (vocabulary x r) and B (r x d): token t has the vector A[t] B."""

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.A = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        # As a dense table does under autocast: the residual stream begins here, in full precision.
        return F.linear(F.embedding(ids, self.A, self.padding_idx), self.B.T).to(self.B.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class PivotedEmbedding(PivotedLinear):
    """A table of token vectors kept as those of r tokens (B) and the coefficients (C) of the others in them."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, rank, False, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        place = self._order()[0][ids]
        pivots = F.embedding(place.clamp(max=self.rank - 1), self.B)
        if self.rank == self.num_embeddings:
            return pivots
        others = F.linear(F.embedding((place - self.rank).clamp(min=0), self.C), self.B.T)
        return torch.where((place < self.rank)[..., None], pivots, others.to(pivots.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
