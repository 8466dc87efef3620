"""Factor modules in place of dense weights, by the name of the weight: the one place that tells kinds of weights apart.

The modules are in linear.py, embedding.py and experts.py; how their tensors are kept is a storage's (storage.py). A
weight is named below a root; the name is empty where the root is itself the weight (an embedding, a head), which then
cannot be replaced in place: `replace` and `store_as` return the new root.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lillama.contract import Weight
from lillama.dense.experts import experts_layout, layout_of, replaced_parameters
from lillama.dense.plain import is_embedding, is_linear, matrix
from lillama.errors import LillamaError
from lillama.lowrank import arithmetic
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.experts import LowRankExperts
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.module import FactorModule, OneMatrix, is_quantised
from lillama.lowrank.rounded import Rounded
from lillama.lowrank.storage import Factors, Tensors, get_storage

KINDS: dict[str, type[FactorModule]] = {
    "linear": LowRankLinear,
    "embedding": LowRankEmbedding,
    "experts": LowRankExperts,
}


def module_of(name: str, kind: str) -> str:
    """The module that is replaced for the weight `name`: a projection of experts is not one of its own."""
    return name.rpartition(".")[0] if kind == "experts" else name


def _split(name: str, kind: str) -> tuple[str, str]:
    """(the module's name, the weight's name inside it, empty where it is the only one)."""
    return (module_of(name, kind), name.rpartition(".")[2]) if kind == "experts" else (name, "")


def dense(root: nn.Module, name: str, kind: str) -> Tensor:
    """The dense weight `name` below `root`: d_out x d_in, or copies x d_out x d_in for experts.

    Raises LillamaError where the module is of another kind.
    """
    where, projection = _split(name, kind)
    module = root.get_submodule(where)
    if projection:
        try:
            return layout_of(module).weight(module, projection)
        except LillamaError as error:
            raise LillamaError(error.what, where=name, hint=error.hint) from error
    if is_factorised(module) or not (is_linear(module) or is_embedding(module)):  # a tied head may be either
        raise _other(module, kind, name)
    return matrix(module)


def check_served(root: nn.Module, weights: Iterable[Weight]) -> None:
    """LillamaError at the first of `weights` (names below `root`) that no factors could stand for.

    There is no such module, it is of another kind or size, or its class computes something of its own. Reads no
    numbers: the model may be a skeleton.
    """
    for weight in weights:
        try:
            found = tuple(dense(root, weight.name, weight.kind).shape)
            if weight.kind != "experts":
                _start(root.get_submodule(weight.name), weight.kind, weight.name)
        except AttributeError as error:
            raise LillamaError("the model has no such module", where=weight.name) from error
        wanted = (weight.copies, *weight.shape) if weight.kind == "experts" else weight.shape
        if found != wanted:
            raise LillamaError(f"the plugin has a weight of {wanted} here, the model one of {found}", where=weight.name)


def leaving(root: nn.Module, weights: Sequence[tuple[str, str]]) -> list[nn.Parameter]:
    """The dense parameters below `root` of which nothing is left when `weights` (name, kind) are replaced."""
    names = [f"{name}.weight".removeprefix(".") for name, kind in weights if kind != "experts"]
    for owner in {module_of(name, kind) for name, kind in weights if kind == "experts"}:
        projections = [n.rpartition(".")[2] for n, kind in weights if module_of(n, kind) == owner and kind == "experts"]
        names += [f"{owner}.{parameter}" for parameter in replaced_parameters(root.get_submodule(owner), projections)]
    return [root.get_parameter(name) for name in names]


def replace(root: nn.Module, name: str, *, kind: str, storage: str, rank: int, device: Any = None) -> nn.Module:
    """Put an empty factor module of the same shape, bias and dtype in place of `root.name`.

    `device` is that of the factors (default: the old weight's). Returns the new module; the old bias is carried over
    (shared, not copied). Of a module of experts, one projection is replaced per call. Where `name` is empty, the root
    itself is meant, and only the caller can put the new module in its place. Raises LillamaError when the module is not
    of the kind the plan says, and for a storage that nobody registered.
    """
    try:
        wanted = get_storage(storage)
    except LillamaError as error:
        raise LillamaError(error.what, where=name, hint=error.hint) from error
    where, projection = _split(name, kind)
    old = root.get_submodule(where)
    new = old if isinstance(old, LowRankExperts) and projection else _start(old, kind, name)
    if isinstance(new, LowRankExperts):
        new.factorise(projection, wanted, rank, device)
    else:
        try:
            new = cast(Any, KINDS[kind]).like(old, wanted, rank, device)
        except LillamaError as error:
            raise LillamaError(error.what, where=name, hint=error.hint) from error
    return _put(root, where, new.train(old.training))


def _start(old: nn.Module, kind: str, name: str) -> nn.Module:
    """`old` if it is a dense module of `kind`; for fused experts the module whose projections can be replaced."""
    projection = name.rpartition(".")[2]
    layout = experts_layout(old) if kind == "experts" else None
    if layout and projection in layout.projections:
        return LowRankExperts(old)
    served = {"linear": is_linear, "embedding": is_embedding}.get(kind)
    if served is None or is_factorised(old) or not served(old):
        raise _other(old, kind, name)
    return old


def _other(module: nn.Module, kind: str, name: str) -> LillamaError:
    """The error of a weight that the plan takes for one of `kind`."""
    known = (nn.Linear, nn.Embedding)
    more = " whose forward is its own" if isinstance(module, known) and type(module) not in known else ""
    return LillamaError(f"the plan has {kind} here, the model a {type(module).__name__}{more}", where=name)


def _put(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at `name` below `root`, unless it is the root itself; returns `module`."""
    parent, _, child = name.rpartition(".")
    if child:
        setattr(root.get_submodule(parent), child, module)
    return module


def set_factors(root: nn.Module, name: str, kind: str, A: Tensor, B: Tensor) -> None:
    """Give the replaced weight `name` below `root` the factors A and B."""
    where, inside = _split(name, kind)
    module = cast(FactorModule, root.get_submodule(where))
    module.matrices()[inside].set_factors(module, A, B)


def factors(root: nn.Module, name: str, kind: str) -> Factors:
    """Two factors of the replaced weight `name` below `root`, stacked for experts."""
    where, inside = _split(name, kind)
    module = cast(FactorModule, root.get_submodule(where))
    return module.matrices()[inside].factors(module)


def product(root: nn.Module, name: str, kind: str) -> Tensor:
    """The matrix that stands for the replaced weight `name` below `root`, stacked for experts."""
    where, inside = _split(name, kind)
    module = cast(FactorModule, root.get_submodule(where))
    return module.matrices()[inside].product(module)


def held(root: nn.Module, name: str, kind: str) -> dict[str, Tensor]:
    """The tensors of the replaced weight `name` below `root`, by suffix."""
    where, inside = _split(name, kind)
    module = cast(FactorModule, root.get_submodule(where))
    return module.matrices()[inside].tensors(module)


def replace_tied(root: nn.Module, head: str, embedding: str, storage: str, rank: int) -> list[str]:
    """Put a linear that has the tensors of the embedding in place of `head`; the names of those tensors."""
    old: Any = root.get_submodule(head)
    if is_factorised(old):
        given = get_storage(storage)
        shape = (old.in_features, old.out_features, rank, old.bias is not None)
        new = LowRankLinear(given, *shape, device="meta")
        new.bias = old.bias
    else:
        new = LowRankLinear.like(old, get_storage(storage), rank, "meta")
    _put(root, head, new.train(old.training))
    table = root.get_submodule(embedding)
    names = tie(new, table)
    for name in (name for name in new.storage.indices if name not in new.storage.shared_indices):
        new.register_buffer(name, table.get_buffer(name).clone())  # a file holds them for both
    return names


def open_experts(root: nn.Module, name: str) -> None:
    """Let every projection of the experts that the weight `name` is one of be reached by itself; all stay dense."""
    where = module_of(name, "experts")
    old = root.get_submodule(where)
    if not isinstance(old, LowRankExperts):
        _put(root, where, LowRankExperts(old).train(old.training))


def close_experts(root: nn.Module) -> None:
    """Undo `open_experts` wherever every projection stayed dense: a checkpoint does not speak of those modules."""
    for name, module in list(factor_modules(root)):
        if isinstance(module, LowRankExperts) and not module.matrices():
            _put(root, name, module.to_dense().train(module.training))


def put(root: nn.Module, name: str, kind: str, tensors: Tensors) -> None:
    """Give the replaced weight `name` below `root` the tensors of its storage."""
    where, inside = _split(name, kind)
    module = cast(FactorModule, root.get_submodule(where))
    module.matrices()[inside].put(module, tensors)


def is_factorised(module: nn.Module) -> bool:
    """Whether `module` is one of ours."""
    return isinstance(module, FactorModule)


def factor_modules(root: nn.Module) -> Iterator[tuple[str, FactorModule]]:
    """The factor modules below `root`, by name; one that has several names comes under the first."""
    return ((name, module) for name, module in root.named_modules() if isinstance(module, FactorModule))


def count_parameters(root: nn.Module) -> int:
    """How many numbers the weights below `root` are: what few bits hold counts as in full, what is shared once."""
    scales: dict[int, int] = {}  # of those that stand for more numbers than they are
    for _, module in factor_modules(root):
        for found in module.matrices().values():
            if isinstance(found.storage, Rounded):
                *copies, d_out, d_in = found.shape
                own = [module.get_parameter(found.prefix + suffix) for suffix in found.storage.parameters]
                numbers = found.storage.numbers(d_out, d_in, found.rank) * (copies[0] if copies else 1)
                scales |= {id(own[0]): numbers, **{id(one): 0 for one in own[1:]}}
    return sum(scales.get(id(p), p.numel()) for p in root.parameters())


def is_factor(root: nn.Module, name: str) -> bool:
    """Whether the parameter `name` below `root` is a factor: not a bias, and no projection that stays dense."""
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    return isinstance(module, FactorModule) and module.is_factor(leaf)


def check_plain(name: str, module: FactorModule) -> None:
    """LillamaError where a parameter of `module`, called `name`, is kept in fewer bits than a checkpoint's."""
    for leaf, parameter in module.named_parameters(recurse=False):
        if is_quantised(parameter):
            raise LillamaError(
                f"a checkpoint holds floating-point numbers, this is kept as {type(parameter).__name__}",
                where=f"{name}.{leaf}",
                hint="Save before quantising, and quantise what is loaded; or torch.save(model.state_dict(), file).",
            )


def markers(module_name: str, kind: str) -> dict[str, Tensor]:
    """The tensors stored beside the factors of a module under names of the dense module's (see FactorModule)."""
    return {f"{module_name}.{leaf}": tensor for leaf, tensor in KINDS[kind].markers().items()}


def dense_names(name: str, kind: str) -> list[str]:
    """Parameters that the model loses when the weight `name` is replaced; a checkpoint's are to be ignored."""
    return [f"{module_of(name, kind)}.{leaf}" for leaf in KINDS[kind].dense_parameters]


def tie(head: nn.Module, embedding: nn.Module) -> list[str]:
    """Make the factors of `head` those of `embedding`; the names of the parameters that are one now."""
    storage, matrix = cast(OneMatrix, embedding).storage, cast(OneMatrix, head).matrix
    for name in storage.parameters:
        setattr(head, name, getattr(embedding, name))
    for name in storage.shared_indices:  # buffers that are moved would be two again, and transformers ties no buffers
        delattr(head, name)
        matrix.elsewhere = embedding
    matrix.forget_derived()
    return list(storage.parameters)


def copy_indices(head: nn.Module, embedding: nn.Module) -> None:
    """Give `head`, whose factors are those of `embedding`, the whole-number tensors that go with them."""
    storage = cast(OneMatrix, embedding).storage
    for name in (name for name in storage.indices if name not in storage.shared_indices):
        head.get_buffer(name).copy_(embedding.get_buffer(name))
    cast(OneMatrix, head).matrix.forget_derived()


def lay_out(root: nn.Module) -> None:
    """Put the numbers of the linears below `root` in the order in memory that is read fastest; embeddings read rows."""
    found = [module for _, module in factor_modules(root)]
    arithmetic.lay_out((m for m in found if m.kind == "linear"), (m for m in found if m.kind != "linear"))


def to_dense(module: nn.Module) -> nn.Module:
    """The dense module that computes what a factor module computes."""
    return cast(FactorModule, module).to_dense()


def store_as(root: nn.Module, name: str, kind: str, storage: str, tensors: Tensors | None = None) -> nn.Module:
    """Keep the replaced weight `name` below `root` in another storage; returns the root, a new one if it is the weight.

    The matrix is the same up to rounding, or what `tensors` of that storage hold.
    """
    where, inside = _split(name, kind)
    module: Any = root.get_submodule(where)
    if module.matrices()[inside].storage.name == storage:
        return root
    if inside:
        module.store_as(inside, get_storage(storage), tensors)
        return root
    new = _put(root, where, module.in_storage(get_storage(storage), tensors))
    return root if where else new
