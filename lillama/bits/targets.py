"""Which matrices of a model in memory are to be kept in few bits, and the tensors of each in the forms it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lillama.contract import WeightKind
from lillama.dense.plain import is_embedding, is_linear
from lillama.lowrank import swap
from lillama.lowrank.experts import LowRankExperts
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.storage import get_storage
from lillama.lowrank.whole import NAME as DENSE


@dataclass(frozen=True)
class Target:
    """A matrix, or a stack of them: its `shape` ends with d_out, d_in, and `storage` is what holds it now."""

    name: str
    kind: WeightKind
    shape: tuple[int, ...]
    rank: int
    storage: str
    tied: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """d_out, d_in."""
        return self.shape[-2], self.shape[-1]

    @property
    def copies(self) -> int:
        """How many matrices there are."""
        return self.shape[0] if len(self.shape) == 3 else 1


def find_targets(model: nn.Module, offered: Sequence[tuple[str, WeightKind]], what: str) -> list[Target]:
    """The weights of low rank and, unless `what` is "factors", the dense ones of those `offered` (name, kind).

    Without the embedding and the head (`find_ends`), and without what is in few bits already.
    """
    ends = find_ends(model)
    outside = {end.name for end in ends}
    found = []
    for name, module in swap.factor_modules(model):
        for inside, matrix in module.matrices().items():
            full = f"{name}.{inside}" if inside else name
            if full not in outside and not isinstance(matrix.storage, Rounded):
                found.append(Target(full, module.kind, matrix.shape, matrix.rank, matrix.storage.name))
    known = {target.name for target in found} | outside
    for name, kind in offered if what != "factors" else ():
        if name in known or kind not in ("linear", "experts") or not _is_dense(model, name, kind):
            continue
        if kind == "experts":
            swap.open_experts(model, name)
        shape = tuple(dense(model, name, kind).shape)
        found.append(Target(name, kind, shape, min(shape[-2:]), DENSE))
    return found


def _is_dense(model: nn.Module, name: str, kind: str) -> bool:
    module: Any = model.get_submodule(swap.module_of(name, kind))
    if isinstance(module, LowRankExperts):
        return name.rpartition(".")[2] not in module.matrices()
    return not swap.is_factorised(module)


def find_ends(model: Any) -> list[Target]:
    """The embedding and the head, where the model has them and their modules are ordinary ones.

    None of them where others, such as the two ends of an encoder and a decoder, have the same table.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[Target] = []
    for get, kind in ((model.get_input_embeddings, "embedding"), (model.get_output_embeddings, "linear")):
        try:
            module = get()
        except (NotImplementedError, AttributeError):  # what reads no tokens has no embedding
            continue
        name = names.get(id(module))
        if name is None or not (swap.is_factorised(module) or is_embedding(module) or is_linear(module)):
            continue
        shape, rank, storage = tuple(_matrix(module).shape), 0, DENSE
        if swap.is_factorised(module):
            shape, rank, storage = module.matrix.shape, module.rank, module.storage.name
        shares = bool(found) and _share(module, model.get_submodule(found[0].name))
        tied = found[0].name if shares else None
        found.append(Target(name, kind, shape, rank or min(shape), storage, tied))  # type: ignore[arg-type]
    return [] if _have_others(model, {end.name for end in found}) else found


def _have_others(model: nn.Module, names: set[str]) -> bool:
    """Whether a parameter of these modules is that of another, or one of them has another name."""
    held = {id(p) for name in names for p in model.get_submodule(name).parameters(recurse=False)}
    return any(
        id(parameter) in held and name not in names
        for name, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _matrix(module: Any) -> Any:
    return module.weight if not swap.is_factorised(module) else torch.empty(module.matrix.shape, device="meta")


def _share(one: nn.Module, other: nn.Module) -> bool:
    held = {id(parameter) for parameter in one.parameters(recurse=False)}
    return any(id(parameter) in held for parameter in other.parameters(recurse=False))


def dense(model: nn.Module, name: str, kind: str) -> Tensor:
    """The dense weight `name`; of experts that have factors elsewhere, too."""
    module: Any = model.get_submodule(swap.module_of(name, kind))
    if isinstance(module, LowRankExperts):
        return module.weight(name.rpartition(".")[2]).detach()
    return swap.dense(model, name, kind).detach()


def forms(model: nn.Module, target: Target, bases: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a weight in each of these storages, by suffix; every one holds the same matrix up to rounding."""
    found: dict[str, dict[str, Tensor]] = {}
    if target.storage == DENSE:
        return {DENSE: {"W": dense(model, target.name, target.kind)}}
    for base in bases:
        if base == target.storage:
            held = swap.held(model, target.name, target.kind)
            found[base] = {suffix: tensor.detach() for suffix, tensor in held.items()}
            continue
        if base == DENSE:
            found[base] = {"W": swap.product(model, target.name, target.kind).detach()}
            continue
        A, B = (factor.detach() for factor in swap.factors(model, target.name, target.kind))
        if A.dim() == 2:
            found[base] = get_storage(base).encode(A, B)
        else:
            each = [get_storage(base).encode(*both) for both in zip(A, B)]
            found[base] = {suffix: torch.stack([one[suffix] for one in each]) for suffix in each[0]}
    return found


def put(model: nn.Module, target: Target, storage: Rounded, tensors: dict[str, Tensor]) -> None:
    """Let the weight be kept in few bits from now on."""
    if target.storage == DENSE:
        swap.replace(model, target.name, kind=target.kind, storage=storage.name, rank=target.rank)
        swap.put(model, target.name, target.kind, tensors)
    else:
        swap.store_as(model, target.name, target.kind, storage.name, tensors)


def is_even(storage: Rounded, target: Target) -> bool:
    """Whether bits of these tensors fill whole bytes."""
    return storage.is_even(*target.matrix, target.rank)
