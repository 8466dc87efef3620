"""The factors of a linear as `nn.Linear` children, which is what tools that quantise, adapt or watch a model look for.

A view owns nothing: its weight is its owner's parameter, under the owner's name, so that no state dict, count or
optimiser finds anything twice. The owner multiplies by its own tensors and does not call a view, which costs a token
nothing; it calls what a tool put in a view's place, and a view that a tool hooked or patched (`CalledView`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lillama.errors import LillamaError
from lillama.lowrank.arithmetic import ONE_MATRIX, Products
from lillama.lowrank.module import Matrix
from lillama.lowrank.storage import Storage

PREFIX = "linear_"  # of a view's name: `<module>.linear_A` beside the parameter `<module>.A`


class FactorView(nn.Linear):
    """One factor of a linear as a linear: x -> x F^T for the owner's parameter F, read and written as `weight`."""

    _is_hf_initialized = True  # transformers would fill the weight of an nn.Linear that it takes for new

    def __init__(self, parameters: dict[str, Any], name: str) -> None:
        """The parameter `name` of `parameters`, the `_parameters` of the owner itself.

        Not the owner: a circle of references would keep its numbers in memory until the next search for such.
        """
        nn.Module.__init__(self)
        self.held, self.name = parameters, name
        self.out_features, self.in_features = parameters[name].shape
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # an attribute of nn.Linear
        """The owner's parameter. AttributeError while that is parametrised, and so no parameter."""
        found: Tensor | None = self.held.get(self.name)
        if found is None:
            raise AttributeError(f"the module has no parameter {self.name} at present")
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.register_parameter(name, value)
            return
        if name == "forward" or (name == "bias" and value is not None):
            self._have_called()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise LillamaError(
                "the weight of a view is a factor, which stays",
                where=PREFIX + self.name,
                hint="Put another module in its place, or give it another weight.",
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As always; a weight becomes the owner's parameter."""
        if name != "weight":
            super().register_parameter(name, param)
        elif isinstance(param, nn.Parameter):
            self.held[self.name] = param
        else:
            raise LillamaError(f"a factor is an nn.Parameter, not {type(param).__name__}", where=PREFIX + self.name)

    # Whoever hooks a linear wants it called.
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As always."""
        self._have_called()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As always."""
        self._have_called()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As always."""
        self._have_called()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As always."""
        self._have_called()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def _have_called(self) -> None:
        self.__class__ = CalledView


class CalledView(FactorView):
    """A view that its owner calls."""


def add_views(owner: nn.Module, storage: Storage) -> None:
    """Give `owner` a view of each parameter that is a matrix with numbers in it; scales of few bits are none."""
    for name in storage.parameters:
        parameter = owner._parameters[name]
        if name not in storage.narrow and parameter is not None and parameter.dim() == 2 and parameter.numel():
            owner.add_module(PREFIX + name, FactorView(owner._parameters, name))


def multiply_through(owner: nn.Module, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """What `owner` computes where something stands in the place of its views: that is called for its factor.

    Raises LillamaError where the storage multiplies by something else than that factor itself.
    """
    tensors = matrix.tensors(owner)
    instead = {}
    for name in tensors:
        child = owner._modules.get(PREFIX + name)
        if child is not None and type(child) is not FactorView:
            instead[name] = child
    called: set[str] = set()

    def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        for name, child in instead.items():
            if tensors[name] is W:
                called.add(name)
                y: Tensor = child(x)
                return y if bias is None else y + bias
        return F.linear(x, W, bias)

    products = Products(linear, ONE_MATRIX.permute) if instead else ONE_MATRIX
    y = matrix.storage.multiply(x, tensors, matrix.derived(owner), products, bias)
    if len(called) < len(instead):
        missed = next(name for name in instead if name not in called)
        raise LillamaError(
            f"the storage '{matrix.storage.name}' cannot call what was put in the place of {PREFIX + missed}",
            hint=f"It multiplies by something made of {missed}. Give the view that was there another weight instead.",
        )
    return y
