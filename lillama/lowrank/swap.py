"""Factor modules in place of dense weights: the functions that tell the kinds of weights apart; nobody else needs to.

The modules are in lowrank.py (linears and embeddings) and experts.py (stacked experts). A weight is named below a
root; the name is empty where the root is itself the weight (an embedding, a head), which then cannot be replaced in
place: `replace` and `store_as` return the new root.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lillama.contract import Weight
from lillama.errors import LillamaError
from lillama.lowrank.embedding import LowRankEmbedding, PivotedEmbedding
from lillama.lowrank.experts import PROJECTIONS, LowRankExperts, dense_weight, is_fused, replaced_parameters
from lillama.lowrank.linear import LowRankLinear, PivotedLinear

__all__ = ["LowRankEmbedding", "LowRankExperts", "LowRankLinear", "PivotedEmbedding", "PivotedLinear"]


STORAGES: dict[tuple[str, str], type[nn.Module]] = {
    ("linear", "factors"): LowRankLinear,
    ("linear", "pivoted"): PivotedLinear,
    ("embedding", "factors"): LowRankEmbedding,
    ("embedding", "pivoted"): PivotedEmbedding,
    ("experts", "factors"): LowRankExperts,
    ("experts", "pivoted"): LowRankExperts,
}


def module_of(name: str, kind: str) -> str:
    """The module that is replaced for the weight `name`: a projection of experts is not one of its own."""
    return name.rpartition(".")[0] if kind == "experts" else name


def dense(root: nn.Module, name: str, kind: str) -> Tensor:
    """The dense weight `name` below `root`: d_out x d_in, or copies x d_out x d_in for experts."""
    module = root.get_submodule(module_of(name, kind))
    if kind == "experts":
        return dense_weight(module, name.rpartition(".")[2])
    return cast(nn.Linear, module).weight.detach()


def leaving(root: nn.Module, weights: Sequence[tuple[str, str]]) -> list[nn.Parameter]:
    """The dense parameters below `root` of which nothing is left when `weights` (name, kind) are replaced."""
    names = [f"{name}.weight".removeprefix(".") for name, kind in weights if kind != "experts"]
    for owner in {module_of(name, kind) for name, kind in weights if kind == "experts"}:
        projections = [n.rpartition(".")[2] for n, kind in weights if module_of(n, kind) == owner and kind == "experts"]
        names += [f"{owner}.{parameter}" for parameter in replaced_parameters(projections)]
    return [root.get_parameter(name) for name in names]


def replace(root: nn.Module, name: str, *, kind: str, storage: str, rank: int, device: Any = None) -> nn.Module:
    """Put an empty factor module of the same shape, bias and dtype in place of `root.name`.

    `device` is that of the factors (default: the old weight's). Returns the new module; the old bias is carried over
    (shared, not copied). Of a module of experts, one projection is replaced per call. Where `name` is empty, the root
    itself is meant, and only the caller can put the new module in its place. Raises LillamaError when the module is not
    of the kind the plan says.
    """
    where = module_of(name, kind)
    old = root.get_submodule(where)
    if (kind, storage) not in STORAGES:
        raise LillamaError(f"no '{storage}' storage exists for a weight of kind '{kind}'", where=name)
    parent, _, child = where.rpartition(".")
    if kind == "experts":
        projection = name.rpartition(".")[2]
        if not isinstance(old, LowRankExperts):
            if not is_fused(old) or projection not in PROJECTIONS:
                raise LillamaError(f"the plan has {kind} here, the model a {type(old).__name__}", where=name)
            old = LowRankExperts(old).train(old.training)
            setattr(root.get_submodule(parent), child, old)
        old.factorise(projection, rank, storage, device)
        return old
    new = _like(old, kind, storage, rank, device, name)
    if child:
        setattr(root.get_submodule(parent), child, new)
    return new.train(old.training)


def _like(old: nn.Module, kind: str, storage: str, rank: int, device: Any, name: str) -> nn.Module:
    """An empty factor module of the shape, bias and dtype of the dense module `old`."""
    if kind == "embedding" and isinstance(old, nn.Embedding):
        if type(old).forward is not nn.Embedding.forward:  # one that scales its output, say
            raise LillamaError(f"a {type(old).__name__} does more than look vectors up", where=name)
        options = (device or old.weight.device, old.weight.dtype)
        return STORAGES[kind, storage](old.num_embeddings, old.embedding_dim, rank, old.padding_idx, *options)
    if kind != "linear" or not isinstance(old, nn.Linear):
        raise LillamaError(f"the plan has {kind} here, the model a {type(old).__name__}", where=name)
    new = STORAGES[kind, storage](
        old.in_features, old.out_features, rank, old.bias is not None, device or old.weight.device, old.weight.dtype
    )
    new.bias = old.bias
    return new


def set_factors(root: nn.Module, name: str, kind: str, A: Tensor, B: Tensor) -> None:
    """Give the replaced weight `name` below `root` the factors A and B."""
    module: Any = root.get_submodule(module_of(name, kind))
    if kind == "experts":
        module.set_factors(name.rpartition(".")[2], A, B)
    else:
        module.set_factors(A, B)


def is_factorised(module: nn.Module) -> bool:
    """Whether `module` is one of ours."""
    return isinstance(module, tuple(STORAGES.values()))


def kind_of(module: nn.Module) -> str | None:
    """The kind of weight that `module` holds factors of; None: it is not one of ours."""
    return next((kind for (kind, _), cls in STORAGES.items() if type(module) is cls), None)


def is_factor(root: nn.Module, name: str) -> bool:
    """Whether the parameter `name` below `root` is a factor: not a bias, and no projection that stays dense."""
    owner, _, leaf = name.rpartition(".")
    return is_factorised(root.get_submodule(owner)) and leaf.rpartition("_")[2] in ("A", "B", "C")


def markers(module_name: str, kind: str) -> dict[str, Tensor]:
    """The tensor stored beside the factors of a module under a name of the dense module's.

    Without lillama imported, transformers would fill dense weights with random numbers and only warn; the wrong
    shape of this tensor makes it fail instead. That of experts has three dimensions, so that the fused parameter it
    stands for can still be split as the hub's format splits it.
    """
    if kind == "experts":
        return {f"{module_name}.down_proj": torch.empty(1, 0, 0)}
    return {f"{module_name}.weight": torch.empty(0)}


def dense_names(name: str, kind: str) -> list[str]:
    """Parameters that the model loses when the weight `name` is replaced; a checkpoint's are to be ignored."""
    module = module_of(name, kind)
    return [f"{module}.gate_up_proj", f"{module}.down_proj"] if kind == "experts" else [f"{module}.weight"]


def check_storage(weights: Iterable[Weight], storage: str) -> None:
    """LillamaError unless every weight can be kept in `storage`."""
    for weight in weights:
        if (weight.kind, storage) not in STORAGES:
            known = sorted(s for kind, s in STORAGES if kind == weight.kind)
            raise LillamaError(
                f"'{weight.name}' ({weight.kind}) cannot be kept in {storage} storage",
                where="compress.storage",
                hint=f"Use {' or '.join(known)}, or list it under compress.skip." if known else None,
            )


def tie(head: Any, embedding: Any) -> list[str]:
    """Make the factors of `head` those of `embedding`; the names of the parameters that are one now."""
    names = ["A", "B"] if hasattr(embedding, "A") else ["B", "C"]
    for name in names:
        setattr(head, name, getattr(embedding, name))
    return names


def to_dense(module: Any) -> nn.Module:
    """The dense module that computes what a factor module computes."""
    kind = kind_of(module)
    if kind == "experts":
        return cast(nn.Module, module.to_dense())
    weight = module.weight.detach()
    if kind == "embedding":
        shape = (module.num_embeddings, module.embedding_dim, module.padding_idx)
        embedding = nn.Embedding(*shape, device="meta", dtype=weight.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding
    linear = nn.Linear(
        module.in_features, module.out_features, module.bias is not None, device="meta", dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias
    return linear


def store_as(root: nn.Module, name: str, kind: str, storage: str) -> nn.Module:
    """Keep the replaced weight `name` below `root`, which holds two factors, in another storage; returns the root."""
    if storage == "factors":
        return root
    parent, _, child = name.rpartition(".")
    if kind == "experts":
        root.get_submodule(parent).store_as(child, storage)  # type: ignore[operator]
        return root
    old: Any = root.get_submodule(name)
    if kind == "embedding":
        shape = (old.num_embeddings, old.embedding_dim, old.rank, old.padding_idx)
    else:
        shape = (old.in_features, old.out_features, old.rank, old.bias is not None)
    new = STORAGES[kind, storage](*shape, old.A.device, old.A.dtype)
    new.set_factors(old.A, old.B)  # type: ignore[operator]
    if kind != "embedding":
        new.bias = old.bias
    if not child:
        return new
    setattr(root.get_submodule(parent), child, new)
    return root


def train_as_factors(root: nn.Module) -> list[tuple[str, str]]:
    """Put balanced factors in place of every pivoted weight below `root`; (name, kind) of each, for `store_as` later.

    Both hold the same matrices, but pivot rows and coefficients differ in size, and one learning rate does not suit
    both.
    """
    # A head that is tied stays as it is: the embedding's factors would no longer be its own.
    tied = {id(m.B) for m in root.modules() if type(m) is PivotedEmbedding}
    modules = [(name, module) for name, module in root.named_modules() if type(module) is PivotedLinear]
    names = [(name, "linear") for name, module in modules if id(module.B) not in tied]
    for name, _ in names:
        old: Any = root.get_submodule(name)
        new = LowRankLinear(
            old.in_features, old.out_features, old.rank, old.bias is not None, old.B.device, old.B.dtype
        )
        new.set_factors(*old.factors())
        new.bias = old.bias
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, new.train(old.training))
    for name, module in root.named_modules():
        if isinstance(module, LowRankExperts):
            for projection in filter(module.is_pivoted, PROJECTIONS):
                module.store_as(projection, "factors")
                names.append((f"{name}.{projection}", "experts"))
    return names
