"""A linear map of low rank, in any storage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lillama.lowrank.module import Matrix, OneMatrix
from lillama.lowrank.storage import Storage


class LowRankLinear(OneMatrix):
    """y = W x + b with W of rank r. The bias stays on the output side."""

    kind = "linear"
    bias: nn.Parameter | None

    def __init__(
        self, storage: Storage, in_features: int, out_features: int, rank: int, bias: bool = False, **options: Any
    ) -> None:
        """`options`: device and dtype."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.matrix = Matrix("", storage, rank, (out_features, in_features))
        self.matrix.register_empty(self, options)
        first: Tensor = next(self.parameters())
        self.register_parameter("bias", nn.Parameter(first.new_empty(out_features)) if bias else None)

    @classmethod
    def like(cls, dense: nn.Linear, storage: Storage, rank: int, device: Any = None) -> LowRankLinear:
        """An empty one of the shape and dtype of `dense`, whose bias it takes (shared, not copied)."""
        options = {"device": device or dense.weight.device, "dtype": dense.weight.dtype}
        new = cls(storage, dense.in_features, dense.out_features, rank, dense.bias is not None, **options)
        new.bias = dense.bias
        return new

    def in_storage(self, storage: Storage) -> LowRankLinear:
        """The same map, up to rounding, in another storage; the bias is shared."""
        first = getattr(self, self.storage.parameters[0])
        options = {"device": first.device, "dtype": first.dtype}
        new = type(self)(storage, self.in_features, self.out_features, self.rank, self.bias is not None, **options)
        new.set_factors(*self.factors())
        new.bias = self.bias
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix
        return matrix.storage.multiply(x, matrix.tensors(self), matrix.derived(self), bias=self.bias)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that computes the same."""
        weight = self.weight.detach()
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear
