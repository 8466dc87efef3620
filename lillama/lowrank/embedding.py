"""A table of token vectors of low rank, in any storage; one that scales its vectors, say, goes on doing so."""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from lillama.dense.plain import is_embedding, is_plain_embedding
from lillama.errors import LillamaError
from lillama.lowrank.module import Matrix, OneMatrix
from lillama.lowrank.storage import Storage, Tensors


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
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.matrix = Matrix("", storage, rank, (num_embeddings, embedding_dim))
        self.matrix.register_empty(self, options)

    @classmethod
    def like(cls, dense: nn.Embedding, storage: Storage, rank: int, device: Any = None) -> LowRankEmbedding:
        """An empty one of the shape and dtype of `dense`, that does with its vectors what `dense` does.

        Raises LillamaError for one whose own forward does anything else than that.
        """
        if not is_embedding(dense):
            raise LillamaError(f"a {type(dense).__name__} does more than look vectors up and work on these")
        options = {"device": device or dense.weight.device, "dtype": dense.weight.dtype}
        own: Any = type(dense)
        kind = cls if is_plain_embedding(dense) else _of_class(own)
        new = kind(storage, dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx, **options)
        _take_over(new, dense, ("weight",))
        return new

    def in_storage(self, storage: Storage, tensors: Tensors | None = None) -> LowRankEmbedding:
        """The same table, up to rounding, in another storage, or what its `tensors` hold."""
        first = getattr(self, self.storage.parameters[0])
        shape = (self.num_embeddings, self.embedding_dim, self.rank, self.padding_idx)
        new = type(self)(storage, *shape, device=first.device, dtype=first.dtype)
        new.matrix.put(new, tensors or self.matrix.in_storage(self, storage))
        _take_over(new, self, self._of_the_matrix())
        return new.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        matrix = self.matrix
        return matrix.storage.look_up(ids, matrix.tensors(self), matrix.derived(self), self.padding_idx)

    def around(self, ids: Tensor, rows: Tensor) -> Tensor:
        """What this module puts out for `ids` where the vectors looked up are `rows`."""
        return rows

    def to_dense(self) -> nn.Embedding:
        """The embedding, of the class there was, that holds the same vectors."""
        weight = self.weight.detach()
        shape = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        embedding = nn.Embedding(*shape, device="meta", dtype=weight.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(self, _OwnForward):
            embedding.__class__ = self.dense_class
        _take_over(embedding, self, self._of_the_matrix())
        return embedding.train(self.training)

    def _of_the_matrix(self) -> tuple[str, ...]:
        return (*self.storage.parameters, *self.storage.indices, "matrix")


class _LookedUp(LowRankEmbedding, nn.Embedding):  # type: ignore[override]  # `weight` is made of the factors
    """The low-rank look-up where a subclass of nn.Embedding finds that of its parent."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor | None = self.__dict__["rows"]
        return super().forward(ids) if rows is None else rows


class _OwnForward:
    """What comes before a subclass of nn.Embedding whose parent is `_LookedUp`."""

    dense_class: type[nn.Embedding]
    storage: Storage

    def __init__(self, *args: Any, **options: Any) -> None:
        LowRankEmbedding.__init__(self, *args, **options)  # type: ignore[arg-type]  # it is one, where this is used
        self.__dict__["rows"], self.__dict__["inside"] = None, False

    @property
    def weight(self) -> Tensor:
        # In its forward the dense class asks for its type; what it computes of it was refused (`is_embedding`).
        first: Tensor = getattr(self, self.storage.parameters[0])
        return first if self.__dict__["inside"] else LowRankEmbedding.weight.fget(self)  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        self.__dict__["inside"] = True
        try:
            out: Tensor = super().forward(ids)  # type: ignore[misc]  # that of the dense class
        finally:
            self.__dict__["inside"] = False
        return out

    def around(self, ids: Tensor, rows: Tensor) -> Tensor:
        self.__dict__["rows"] = rows
        try:
            return self.forward(ids)
        finally:
            self.__dict__["rows"] = None


@functools.cache
def _of_class(dense: Any) -> type[LowRankEmbedding]:
    """A low-rank embedding that is also a `dense`, so that models set up its buffers, and that runs its forward."""
    return type(f"LowRank{dense.__name__}", (_OwnForward, dense, _LookedUp), {"dense_class": dense})


def _take_over(new: nn.Module, old: nn.Module, without: Container[str]) -> None:
    """Give `new` what `old` has besides `without`: settings, buffers, other parameters and modules (shared)."""
    for name, value in vars(old).items():
        if name not in vars(new) and name not in without and not name.startswith("_is_hf"):
            new.__dict__[name] = value
    for name, buffer in old.named_buffers(recurse=False):
        if name not in without:
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, parameter in old.named_parameters(recurse=False):
        if name not in without:
            new.register_parameter(name, parameter)
    for name, child in old.named_children():
        new.add_module(name, child)
