"""What all factor modules have in common: the modules that stand where dense weights were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lillama.contract import WeightKind
from lillama.lowrank.storage import Factors, Storage, empty_tensors


def is_quantised(tensor: Tensor) -> bool:
    """Whether `tensor` is of a class that keeps numbers in fewer bits, such as torchao's."""
    return type(tensor).dequantize is not Tensor.dequantize


class Matrix:
    """The tensors of one matrix (or of a stack of equal ones) in a module, under a prefix, by the rules of a storage.

    Not a module itself: its tensors are the owner's own parameters and buffers, `<prefix><suffix>`.
    """

    def __init__(self, prefix: str, storage: Storage, rank: int, shape: tuple[int, ...]) -> None:
        """`shape`: (d_out, d_in), or (copies, d_out, d_in)."""
        self.prefix, self.storage, self.rank, self.shape = prefix, storage, rank, shape
        self._names = [(suffix, prefix + suffix) for suffix in (*storage.parameters, *storage.indices)]
        self._indices = [prefix + suffix for suffix in storage.indices]
        self._derived: tuple[list[Tensor], Any] | None = None  # of which indices, and what
        self.elsewhere: nn.Module | None = None  # the module that has the shared indices, of a head that is tied to it

    def register_empty(self, owner: nn.Module, options: dict[str, Any]) -> None:
        """Give `owner` the tensors, unfilled; `options`: device and dtype."""
        for suffix, tensor in empty_tensors(self.storage, self.shape, self.rank, options).items():
            if suffix in self.storage.indices:
                owner.register_buffer(self.prefix + suffix, tensor)
            else:
                owner.register_parameter(self.prefix + suffix, nn.Parameter(tensor))

    def remove(self, owner: nn.Module) -> None:
        """Take the tensors away from `owner`."""
        for suffix in (*self.storage.parameters, *self.storage.indices):
            delattr(owner, self.prefix + suffix)

    def tensors(self, owner: nn.Module) -> dict[str, Tensor]:
        """The tensors by suffix."""
        parameters = owner._parameters  # where most are: asking the module for them takes as long as a small product
        found = {}
        for suffix, name in self._names:
            tensor = parameters.get(name)
            found[suffix] = self._index(owner, name) if tensor is None else tensor
        return found

    def _index(self, owner: nn.Module, name: str) -> Tensor:
        found: Tensor = getattr(owner if name in owner._buffers or self.elsewhere is None else self.elsewhere, name)
        return found

    def derived(self, owner: nn.Module) -> Any:
        """What the storage derives of its indices, kept until these are others."""
        if not self._indices:
            return None
        known = self._derived
        if known is not None:
            for name, tensor in zip(self._indices, known[0]):
                if self._index(owner, name) is not tensor:
                    break
            else:
                return known[1]
        held = [self._index(owner, name) for name in self._indices]
        self._derived = held, self._each(self.storage.derive, self.tensors(owner))
        return self._derived[1]

    def forget_derived(self) -> None:
        """The indices were overwritten in place: derive anew when asked."""
        self._derived = None

    def set_factors(self, owner: nn.Module, A: Tensor, B: Tensor) -> None:
        """Take over factors, cast to the dtype of the tensors that hold them."""
        self.put(owner, _encoded(self.storage, A, B))

    def in_storage(self, owner: nn.Module, storage: Storage) -> dict[str, Tensor]:
        """The tensors that hold the same matrix in another storage, up to rounding; nothing is changed."""
        return _encoded(storage, *self.factors(owner))

    def put(self, owner: nn.Module, given: Mapping[str, Tensor]) -> None:
        """Take over the tensors of the storage, by suffix, cast to the dtype of those that hold them."""
        with torch.no_grad():
            for suffix, tensor in self.tensors(owner).items():
                tensor.copy_(given[suffix])
        self.forget_derived()

    def factors(self, owner: nn.Module) -> Factors:
        """Two factors of the matrix, stacked where it is a stack."""
        return Factors(*self._each(self.storage.decode, self._numbers(owner)))

    def product(self, owner: nn.Module) -> Tensor:
        """The matrix itself, or the stack."""
        return self.storage.product(self._numbers(owner), self.derived(owner))

    def _numbers(self, owner: nn.Module) -> dict[str, Tensor]:
        """The tensors, those that a tool keeps in fewer bits as floating-point numbers again."""
        tensors = self.tensors(owner)
        if torch.compiler.is_compiling():
            return tensors
        return {suffix: t.dequantize() if is_quantised(t) else t for suffix, t in tensors.items()}

    def is_factor(self, name: str) -> bool:
        """Whether a tensor of the owner's is a counted one of this matrix."""
        return name.startswith(self.prefix) and name.removeprefix(self.prefix) in self.storage.parameters

    def _each(self, function: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> Any:
        """`function` of the tensors, or of every copy's, the results stacked."""
        if len(self.shape) == 2:
            return function(tensors)
        results = [function({suffix: t[i] for suffix, t in tensors.items()}) for i in range(self.shape[0])]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*results))
        return torch.stack(results) if isinstance(results[0], Tensor) else None


def _encoded(storage: Storage, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Factors, stacked where the matrix is a stack, in a storage."""
    if A.dim() == 2:
        return storage.encode(A, B)
    each = [storage.encode(*both) for both in zip(A, B)]
    return {suffix: torch.stack([one[suffix] for one in each]) for suffix in each[0]}


class FactorModule(nn.Module):
    """What stands where a dense module was. Subclasses say what the kind of weight computes."""

    kind: ClassVar[WeightKind]
    dense_parameters: ClassVar[tuple[str, ...]]
    """Names of the dense module's parameters that are gone. A checkpoint marks them (see `markers`)."""

    def matrices(self) -> dict[str, Matrix]:
        """The matrices in factors, by the name of the weight inside this module ("" where it is the only one)."""
        raise NotImplementedError

    @classmethod
    def markers(cls) -> dict[str, Tensor]:
        """Tensors stored beside the factors under names of the dense module's.

        Without lillama imported, transformers would fill dense weights with random numbers and only warn; the wrong
        shape of these makes it fail instead.
        """
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The dense module that computes what this one computes."""
        raise NotImplementedError

    def narrow(self) -> list[str]:
        """Names of the parameters that are bfloat16 numbers, whatever their type (see Rounded)."""
        return [m.prefix + suffix for m in self.matrices().values() for suffix in m.storage.narrow]

    def is_factor(self, name: str) -> bool:
        """Whether the parameter `name` of this module is a factor: not a bias, nor a projection that stays dense."""
        return any(matrix.is_factor(name) for matrix in self.matrices().values())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for matrix in self.matrices().values():
            matrix.forget_derived()


class OneMatrix(FactorModule):
    """A factor module of one matrix."""

    dense_parameters = ("weight",)
    matrix: Matrix

    def matrices(self) -> dict[str, Matrix]:
        return {"": self.matrix}

    @classmethod
    def markers(cls) -> dict[str, Tensor]:
        return {"weight": torch.empty(0)}

    @property
    def storage(self) -> Storage:
        """The format of its tensors."""
        return self.matrix.storage

    @property
    def rank(self) -> int:
        """The rank."""
        return self.matrix.rank

    @property
    def weight(self) -> Tensor:
        """The matrix (d_out x d_in). Some architectures read a projection's weight directly (DESIGN 9)."""
        return self.matrix.product(self)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take over A (d_out x r) and B (r x d_in), cast to this module's dtype."""
        self.matrix.set_factors(self, A, B)

    def factors(self) -> Factors:
        """Factors A (d_out x r) and B (r x d_in) of the matrix."""
        return self.matrix.factors(self)

    def extra_repr(self) -> str:
        d_out, d_in = self.matrix.shape
        return f"{d_in}, {d_out}, rank={self.rank}, storage={self.storage.name}"
