"""The contract of a storage format: one class says everything that is known of one way to keep a low-rank matrix.

A format knows matrices alone: which tensors stand for W (d_out x d_in) of rank r, how many numbers they hold, how two
factors become these tensors and the other way round, and how they multiply. What a linear, an embedding or a stack of
experts is, the modules know (linear.py, embedding.py, experts.py), and they serve every format. So a format of your own
is one file with one class and one line in registry.py, or a call of `registries.storages.add` in a plugin.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.lowrank.arithmetic import ONE_MATRIX as ONE_MATRIX  # for whoever writes a format
from lillama.lowrank.arithmetic import Products as Products

Tensors = Mapping[str, Tensor]  # the tensors of one matrix by suffix: A and B of `<module>.A` and `<module>.B`


class Factors(NamedTuple):
    """A rank-r matrix as a product: A (d_out x r) times B (r x d_in). Stacked ones have one more dimension in front."""

    A: Tensor
    B: Tensor


class Storage(ABC):
    """One way to keep a rank-r matrix W (d_out x d_in). Instances hold nothing: get one from `get_storage`."""

    name: str = ""  # in recipes and checkpoints; `get_storage` sets it to the name the class is registered under
    parameters: ClassVar[tuple[str, ...]]
    """Suffixes of the tensors that are counted, saved, and shared by an embedding with the head that is tied to it."""
    indices: ClassVar[tuple[str, ...]] = ()
    """Suffixes of whole-number tensors that are saved beside them: not counted, not trained, not shared."""
    shared_indices: ClassVar[tuple[str, ...]] = ()
    """Those of the indices that are numbers of the matrix itself, and so shared like parameters."""
    narrow: ClassVar[tuple[str, ...]] = ()
    """Those of the parameters that are saved as bfloat16 numbers, whatever the type of the model."""
    trained_as: ClassVar[str | None] = "factors"
    """The format whose tensors learn in the place of these, which then are made from them; None: these learn."""

    @abstractmethod
    def shapes(self, d_out: int, d_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by suffix: those of `parameters`, then those of `indices`."""

    @abstractmethod
    def encode(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The tensors, by suffix, that hold A (d_out x r) times B (r x d_in); whoever takes them casts them."""

    @abstractmethod
    def decode(self, tensors: Tensors) -> Factors:
        """Two factors of the matrix that the tensors hold."""

    @abstractmethod
    def multiply(
        self, x: Tensor, tensors: Tensors, derived: Any, products: Products = ONE_MATRIX, bias: Tensor | None = None
    ) -> Tensor:
        """W x + bias for inputs x [..., d_in] -> [..., d_out], by `products` alone; `derived` is that of `derive`."""

    def __deepcopy__(self, memo: Any) -> Storage:
        return self  # a copied module is in the same format

    def numbers(self, d_out: int, d_in: int, rank: int) -> int:
        """How many numbers a matrix of this rank holds. It must rise with the rank."""
        shapes = self.shapes(d_out, d_in, rank)
        return sum(math.prod(shapes[suffix]) for suffix in self.parameters)

    def index_type(self, suffix: str) -> torch.dtype:
        """The type of one of the `indices`."""
        return torch.int64

    def bytes(self, d_out: int, d_in: int, rank: int, each: float) -> int:
        """How many bytes a matrix takes, with `each` for a number in full; row numbers and the like are left out."""
        return round(each * self.numbers(d_out, d_in, rank))

    def derive(self, tensors: Tensors) -> Any:
        """What `multiply` needs of the `indices` and need not be computed at every call: a tensor, a tuple, or None."""
        return None

    def product(self, tensors: Tensors, derived: Any) -> Tensor:
        """The matrix W itself (d_out x d_in); a stack of them for stacked tensors. Gradients flow through it."""
        A, B = self.decode(tensors)
        return A @ B

    def look_up(self, ids: Tensor, tensors: Tensors, derived: Any, padding_idx: int | None = None) -> Tensor:
        """Rows `ids` [...] of W as a table (vocabulary x d) -> [..., d]. A format may well know a faster way."""
        A, B = self.decode(tensors)
        return F.linear(F.embedding(ids, A, padding_idx), B.T)
