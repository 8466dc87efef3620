"""A table of token vectors of low rank, in any storage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lillama.errors import LillamaError
from lillama.lowrank.module import Matrix, OneMatrix
from lillama.lowrank.storage import Storage


class LowRankEmbedding(OneMatrix):
    """The table W (vocabulary x d) of rank r: token t has the vector W[t].

    Its tensors are those of an output head, so that one set can serve a head that is tied to it.
    """

    kind = "embedding"
    bias = None

    def __init__(
        self,
        storage: Storage,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        """`options`: device and dtype."""
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.matrix = Matrix("", storage, rank, (num_embeddings, embedding_dim))
        self.matrix.register_empty(self, options)

    @classmethod
    def like(cls, dense: nn.Embedding, storage: Storage, rank: int, device: Any = None) -> LowRankEmbedding:
        """An empty one of the shape and dtype of `dense`. Raises LillamaError for one that does more than look up."""
        if type(dense).forward is not nn.Embedding.forward:  # one that scales its output, say
            raise LillamaError(f"a {type(dense).__name__} does more than look vectors up")
        options = {"device": device or dense.weight.device, "dtype": dense.weight.dtype}
        return cls(storage, dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx, **options)

    def in_storage(self, storage: Storage) -> LowRankEmbedding:
        """The same table, up to rounding, in another storage."""
        first = getattr(self, self.storage.parameters[0])
        shape = (self.num_embeddings, self.embedding_dim, self.rank, self.padding_idx)
        new = type(self)(storage, *shape, device=first.device, dtype=first.dtype)
        new.set_factors(*self.factors())
        return new.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        matrix = self.matrix
        return matrix.storage.look_up(ids, matrix.tensors(self), matrix.derived(self), self.padding_idx)

    def to_dense(self) -> nn.Embedding:
        """The `nn.Embedding` that holds the same vectors."""
        weight = self.weight.detach()
        shape = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        embedding = nn.Embedding(*shape, device="meta", dtype=weight.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding
