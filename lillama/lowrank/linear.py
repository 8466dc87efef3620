"""A linear map of low rank, in any storage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lillama.dense.plain import is_conv1d, is_linear, matrix
from lillama.errors import LillamaError
from lillama.lowrank.module import Matrix, OneMatrix
from lillama.lowrank.storage import Storage, Tensors
from lillama.lowrank.views import FactorView, add_views, multiply_through


class LowRankLinear(OneMatrix):
    """y = W x + b with W of rank r. The bias stays on the output side.

    Its factors are to be seen as children too, for tools that look for `nn.Linear` (views.py).
    """

    kind = "linear"
    bias: nn.Parameter | None
    conv1d: Any = None  # the class of the dense module where that keeps its weight as d_in x d_out

    def __init__(
        self, storage: Storage, in_features: int, out_features: int, rank: int, bias: bool = False, **options: Any
    ) -> None:
        """`options`: device and dtype."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.matrix = Matrix("", storage, rank, (out_features, in_features))
        self.matrix.register_empty(self, options)
        add_views(self, storage)
        first: Tensor = next(self.parameters())
        self.register_parameter("bias", nn.Parameter(first.new_empty(out_features)) if bias else None)

    @classmethod
    def like(cls, dense: Any, storage: Storage, rank: int, device: Any = None) -> LowRankLinear:
        """An empty one of the shape and dtype of `dense`, whose bias it takes (shared, not copied).

        `dense` is an `nn.Linear` or a Conv1D. Raises LillamaError for one that does more than multiply and add a bias.
        """
        if not is_linear(dense):
            raise LillamaError(f"a {type(dense).__name__} does more than multiply by its weight and add its bias")
        d_out, d_in = matrix(dense).shape
        options = {"device": device or dense.weight.device, "dtype": dense.weight.dtype}
        new = cls(storage, d_in, d_out, rank, dense.bias is not None, **options)
        new.bias = dense.bias
        new.conv1d = type(dense) if is_conv1d(dense) else None
        return new

    def in_storage(self, storage: Storage, tensors: Tensors | None = None) -> LowRankLinear:
        """The same map, up to rounding, in another storage, or what its `tensors` hold; the bias is shared."""
        first = getattr(self, self.storage.parameters[0])
        options = {"device": first.device, "dtype": first.dtype}
        new = type(self)(storage, self.in_features, self.out_features, self.rank, self.bias is not None, **options)
        new.matrix.put(new, tensors or self.matrix.in_storage(self, storage))
        new.bias, new.conv1d = self.bias, self.conv1d
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix
        for child in self._modules.values():
            if type(child) is not FactorView:
                return multiply_through(self, matrix, x, self.bias)
        return matrix.storage.multiply(x, matrix.tensors(self), matrix.derived(self), bias=self.bias)

    def to_dense(self) -> nn.Module:
        """The `nn.Linear`, or Conv1D, that computes the same."""
        weight = self.weight.detach()
        if self.conv1d is not None:
            conv1d: Any = self.conv1d(0, 0)
            conv1d.nf, conv1d.nx = self.out_features, self.in_features
            conv1d.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            conv1d.bias = self.bias
            dense: nn.Module = conv1d.train(self.training)
            return dense
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear
