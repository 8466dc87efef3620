"""The compressed checkpoint: written a shard at a time, loaded strictly, exported dense (docs/checkpoint.md)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from lillama.base import tensorfile
from lillama.base.rundir import RunDirectory
from lillama.base.tensorfile import Entry, TensorFile
from lillama.checkpoint import quantizer
from lillama.checkpoint.seal import NAME as SEAL
from lillama.lowrank import swap as factors
from lillama.plan.plan import Plan
from lillama.pretrained.identity import BESIDE
from lillama.pretrained.source import Source

SHARD_BYTES = 5_000_000_000
# Written anew, or weights in formats that would shadow ours.
NOT_COPIED = ("config.json", "model.safetensors.index.json", "README.md", SEAL)


def write(source: Source, plan: Plan, run: RunDirectory, layer_files: list[str], target: Path, card: str) -> None:
    """Write the compressed model into the empty directory `target`.

    Untouched tensors are copied from the original's files under their own names; finished layers come from
    `layer_files` of the run. Weights are cast to the source's dtype.
    """
    _write_shards(_entries(source, plan, run, layer_files), target)
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype
    config.architectures = [type(source.model).__name__]
    config.quantization_config = quantizer.LillamaConfig(plan.modules(), shared=source.shared, shapes=plan.shapes())
    config.save_pretrained(target)
    assert source.directory is not None
    copy_beside(source.directory, target)
    (target / "README.md").write_text(card, encoding="utf-8")


def _entries(source: Source, plan: Plan, run: RunDirectory, layer_files: list[str]) -> list[Entry]:
    kinds = {name: plan.weights[name].kind for name in plan.ranks}
    modules = {factors.module_of(name, kind): kind for name, kind in kinds.items()}
    replaced = {f"{name}.bias" for name in plan.ranks}.union(*(factors.dense_names(*item) for item in kinds.items()))
    entries = [Entry.of(*item) for name, kind in modules.items() for item in factors.markers(name, kind).items()]
    for file in layer_files:
        layer = Path(file).name[5:].removesuffix(".safetensors")
        tensors = TensorFile(run.path / file)
        for key in tensors:
            name = f"{layer}.{key}"
            if name.rpartition(".")[0] in modules:
                entries.append(tensors.entry(key, source.dtype, name))
                replaced.add(name)
            else:  # a layer's other parameters, where they were trained: they replace the original's
                entries += _as_in_the_file(source, name, tensors, key)
                replaced.add(name)
    opened: dict[Path, TensorFile] = {}
    several = _several(source)
    for name, parts in source.index.items():
        if name in replaced or name in source.aliases:
            continue
        if replaced.intersection(several.get(name, ())):
            entries.append(Entry.of(name, _part(source, name, several[name])))
        else:
            for path, key in parts:
                tensors = opened.get(path) or opened.setdefault(path, TensorFile(path))
                entries.append(tensors.entry(key, source.dtype))
    return entries


def _several(source: Source) -> dict[str, set[str]]:
    """Parameters that one tensor of the files is split into -> all that it becomes."""
    becomes: dict[tuple[Path, str], set[str]] = {}
    for name, parts in source.index.items():
        for part in parts:
            becomes.setdefault(part, set()).add(name)
    together = [names - source.aliases.keys() for names in becomes.values()]
    return {name: names for names in together if len(names) > 1 for name in names}


def _part(source: Source, name: str, together: set[str]) -> Tensor:
    """The parameter `name`, split from the tensor that holds all of `together`."""
    source.materialise([name])
    tensor = source.model.get_parameter(name).detach().to(source.dtype).clone()
    source.release_keys(together)
    return tensor


def _as_in_the_file(source: Source, name: str, tensors: TensorFile, key: str) -> list[Entry]:
    """A dense tensor under the name (or names) the original's files use for it."""
    parts = source.index.get(name, [])
    if name in _several(source):
        return [tensors.entry(key, source.dtype, name)]
    if len(parts) == 1:
        return [tensors.entry(key, source.dtype, parts[0][1])]
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(source.model, {name: tensors.read(key).to(source.dtype)})
    return [Entry.of(out, tensor) for out, tensor in reverted.items()]


def _write_shards(entries: list[Entry], directory: Path) -> None:
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        tensorfile.write(directory / file, [by_name[name] for name in names], {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_beside(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of `source` (tokenizer, processor, settings), less what `target` has."""
    kinds = [*BESIDE]
    said = [target / "config.json", *(f for f in source.glob("*config.json") if f.name not in NOT_COPIED)]
    if any('"auto_map"' in file.read_text(encoding="utf-8") for file in said if file.exists()):
        kinds.append(".py")  # code that the configuration names
    for file in sorted(source.iterdir()):
        wanted = file.suffix in kinds
        if file.is_file() and wanted and file.name not in NOT_COPIED and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def file_bytes(path: Path) -> int:
    """Bytes of the weights of a checkpoint directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
