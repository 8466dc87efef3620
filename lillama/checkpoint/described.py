"""What config.json says of factor modules, checked before any of it is done: it may be damaged, or anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lillama.dense.experts import PROJECTIONS
from lillama.errors import LillamaError
from lillama.lowrank import swap as factors
from lillama.lowrank.rounded import Rounded, read_name
from lillama.lowrank.storage import get_storage

WHERE = "quantization_config"
HINT = "config.json is damaged, or of another model: write the checkpoint again."


def check_version(version: Any, known: int) -> None:
    """LillamaError for a format that this version does not read."""
    if type(version) is not int or version < 1:
        raise _wrong(f"the format version is {version!r}, not a whole number above 0", "version")
    if version > known:
        raise LillamaError(
            f"the checkpoint is of format version {version}, this lillama reads up to {known}", hint="Upgrade lillama."
        )


def check_modules(modules: Any, shared: Any) -> None:
    """LillamaError unless these are descriptions of factor modules, and groups of names."""
    if not isinstance(modules, Mapping):
        raise _wrong(f"the modules are a {type(modules).__name__}, not an object", "modules")
    for name, how in modules.items():
        if not isinstance(how, Mapping):
            raise _wrong(f"a module is described by a {type(how).__name__}, not an object", name)
        kind, rank, tied = how.get("kind"), how.get("rank"), how.get("tied")
        if not isinstance(kind, str) or kind not in factors.KINDS:
            raise _wrong(f"'kind' is {kind!r}, none of {', '.join(factors.KINDS)}", name)
        if not isinstance(how.get("storage"), str):
            raise _wrong(f"'storage' is {how.get('storage')!r}, not a name", name)
        _check_storage(how["storage"], name)
        if type(rank) is not int or rank < 1:
            raise _wrong(f"'rank' is {rank!r}, not a whole number above 0", name)
        if tied is not None and (kind != "linear" or not _is_like(modules, tied, how)):
            raise _wrong(f"it is tied to {tied!r}, which is no embedding of its storage and rank here", name)
    groups = shared if isinstance(shared, Sequence) and not isinstance(shared, str) else [shared] if shared else []
    for group in groups:
        if not isinstance(group, Sequence) or isinstance(group, str) or not all(isinstance(n, str) for n in group):
            raise _wrong(f"a group is {group!r}, not a list of names", "shared")
        if any(one == other or f"{one}.".startswith(f"{other}.") for one, other in _pairs(group)) or "" in group:
            raise _wrong(f"a group names a module twice, or one inside another: {group!r}", "shared")


def check_shapes(shapes: Any) -> None:
    """LillamaError unless these are shapes of linears that lost neurons, by their names."""
    if not isinstance(shapes, Mapping):
        raise _wrong(f"the shapes are a {type(shapes).__name__}, not an object", "shapes")
    for name, shape in shapes.items():
        if not (isinstance(shape, Sequence) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise _wrong(f"a shape is {shape!r}, not two whole numbers above 0", name)


def _check_storage(storage: str, name: Any) -> None:
    """LillamaError for bits that this version does not know. Whether the format is there the host knows, later."""
    try:
        read_name(storage)
    except LillamaError as error:
        raise LillamaError(error.what, where=f"{WHERE}: {name}", hint=error.hint) from error


def _is_like(modules: Mapping[str, Any], tied: Any, how: Mapping[str, Any]) -> bool:
    other = modules.get(tied) if isinstance(tied, str) else None
    wanted = {"kind": "embedding", "storage": how["storage"], "rank": how["rank"]}
    return isinstance(other, Mapping) and {key: other.get(key) for key in wanted} == wanted


def _pairs(group: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(group) for j, b in enumerate(group) if i != j]


def check_places(model: Any, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """LillamaError unless `model` has a dense weight of the kind, and large enough for the rank, at every name."""
    for name, how in modules.items():
        if how["kind"] == "experts" and name.rpartition(".")[2] not in PROJECTIONS:
            raise _wrong(f"experts have no such projection, but {', '.join(PROJECTIONS)}", name)
        try:
            shape = factors.dense(model, name, how["kind"]).shape
        except AttributeError as error:
            raise _wrong(f"the model has no {how['kind']} here", name) from error
        if not 1 <= how["rank"] <= min(shape[-2:]):
            raise _wrong(f"a matrix of {shape[-2]} x {shape[-1]} has no rank {how['rank']}", name)
        try:
            storage = get_storage(how["storage"])
        except LillamaError as error:
            raise LillamaError(error.what, where=f"{WHERE}: {name}", hint=error.hint) from error
        if isinstance(storage, Rounded) and not storage.is_even(shape[-2], shape[-1], how["rank"]):
            raise _wrong(
                f"'{how['storage']}' keeps two columns in a byte; of {shape[-2]} x {shape[-1]} numbers of rank "
                f"{how['rank']} a tensor has an odd number of them",
                name,
            )


def check_all_there(missing: Sequence[str]) -> None:
    """LillamaError that names the first of the modules which the model lacks."""
    if missing:
        raise _wrong("the model has no such module", missing[0])


def _wrong(what: str, name: Any) -> LillamaError:
    return LillamaError(what, where=f"{WHERE}: {name}", hint=HINT)
