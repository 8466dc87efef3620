"""Factor modules from one storage into another: what learns well before a model is fine-tuned, and back behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from lillama.base import ranks, shares
from lillama.base.threads import MOST, side_by_side
from lillama.lowrank.module import FactorModule, Matrix
from lillama.lowrank.storage import Tensors, get_storage
from lillama.lowrank.swap import factor_modules, module_of, store_as


class Kept(NamedTuple):
    """A weight below a root, and the format it is kept in."""

    name: str
    kind: str
    storage: str


def use_trainable_storage(root: nn.Module) -> list[Kept]:
    """Put what learns well in place of every weight below `root` that is kept otherwise; what `store_as` undoes.

    Both hold the same matrices, but one learning rate does not suit pivot rows and coefficients, say, alike.
    """
    # A head that is tied stays as it is: the embedding's factors would no longer be its own.
    shared = {id(p) for _, m in factor_modules(root) if m.kind == "embedding" for p in m.parameters()}
    changed = [
        Kept(f"{name}.{inside}" if inside else name, module.kind, matrix.storage.name)
        for name, module in factor_modules(root)
        if not any(id(p) in shared for p in module.parameters())
        for inside, matrix in module.matrices().items()
        if matrix.storage.trained_as not in (None, matrix.storage.name)
    ]
    store_each(root, [one._replace(storage=cast(str, get_storage(one.storage).trained_as)) for one in changed])
    return changed


def store_each(root: nn.Module, wanted: Sequence[Kept]) -> None:
    """Keep each of the `wanted` weights below `root` in its storage; the processes of a run share the work out.

    All of them call. Each converts some side by side.
    """

    def held(one: Kept) -> tuple[FactorModule, Matrix]:
        module = cast(FactorModule, root.get_submodule(module_of(one.name, one.kind)))
        return module, module.matrices()[one.name.rpartition(".")[2] if one.kind == "experts" else ""]

    def convert(one: Kept) -> Tensors:
        module, matrix = held(one)
        found, dtype = matrix.in_storage(module, get_storage(one.storage)), next(module.parameters()).dtype
        if ranks.world() == 1:
            return found
        # What travels is on the host, and no larger than what is kept.
        return {name: t.to("cpu", dtype if t.is_floating_point() else t.dtype) for name, t in found.items()}

    device, world = next(root.parameters()).device, ranks.world()
    for start in range(0, len(wanted), MOST * world):
        some = wanted[start : start + MOST * world]
        largest = max(held(one)[1].rank for one in some)
        found = ranks.gather(side_by_side(convert, shares.share(some), device, largest))
        for number, one in enumerate(some):
            store_as(root, *one, found[number % world][number // world])
