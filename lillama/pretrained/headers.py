"""A model's files against its skeleton: names and shapes, from the headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lillama.base.tensorfile import TensorFile
from lillama.errors import LillamaError
from lillama.pretrained.locate import weight_files
from lillama.pretrained.vetted import shards_of

OTHER = "The download may be incomplete, or the configuration belongs to another model."
# A head that a checkpoint lacks is made anew by who asks for one; more than that, and the numbers do not belong.
_ROOM = 10_000_000


def open_files(directory: Path) -> dict[Path, TensorFile]:
    """The weights of a directory, their headers read. Raises LillamaError where a file is not what the index says."""
    files = {file: TensorFile(file) for file in weight_files(directory)}
    shards = {} if (directory / "model.safetensors").exists() else shards_of(directory) or {}
    for name, tensors in shards.items():
        file = directory / name
        if gone := sorted(set(tensors) - set(files[file])):
            raise LillamaError(
                f"it lacks {len(gone)} tensors that the index places here, such as {gone[0]}",
                where=str(file),
                hint="Download it again.",
            )
    return files


def index_of(
    model: Any, files: Mapping[Path, TensorFile], directory: Path, aliases: Iterable[str] = ()
) -> dict[str, list[tuple[Path, str]]]:
    """Model key -> the file tensors it is made of. Raises LillamaError where one is missing or of another shape.

    `aliases` are keys of the model that need no tensor of their own.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    index: dict[str, list[tuple[Path, str]]] = {}
    for file, tensors in files.items():
        for key in tensors:
            name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:  # transformers takes it for the model's own name then, too
                name, converted = key, None
            for made in _made_of(name, converted, converters):
                index.setdefault(made, []).append((file, key))
            if converted is None and name in state and tensors.shape(key) != tuple(state[name].shape):
                there, here = list(tensors.shape(key)), list(state[name].shape)
                what = f"'{key}' has the shape {there}, where config.json makes it {here}"
                raise LillamaError(what, where=str(file), hint=OTHER)
    tied = {*(getattr(model, "all_tied_weights_keys", None) or {}), *aliases}
    # What a class says no file needs to hold is made by the class itself (see Source.materialise).
    by_class = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    tied |= {key for key in state if any(re.search(pattern, key) for pattern in by_class)}
    if missing := [k for k, t in state.items() if t.is_meta and k not in index and k not in tied]:
        raise LillamaError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}",
            where=str(directory),
            hint=OTHER,
        )
    return index


def _made_of(name: str, pattern: str | None, converters: Iterable[Any]) -> list[str]:
    """All the model's keys that a tensor of a file becomes, of which `name` is the first: fused ones are split."""
    targets: list[str] = next((c.target_patterns for c in converters if pattern in c.source_patterns), [])
    first = next((target for target in targets if target in name), None)
    return [name] if first is None else [name.replace(first, target) for target in targets]


def check_size(model: Any, files: Iterable[TensorFile], where: str) -> None:
    """LillamaError where a model would take far more memory than its files can fill, so that none is taken for it."""
    asked = sum(p.numel() for p in model.parameters())
    held = sum(math.prod(file.shape(key)) for file in files for key in file)
    if asked > 2 * held + _ROOM:
        raise LillamaError(
            f"the configuration describes a model of {asked:,} numbers, the files hold {held:,}",
            where=where,
            hint=OTHER,
        )
