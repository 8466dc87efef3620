"""The compressed checkpoint: written a shard at a time, loaded strictly, exported dense (docs/checkpoint.md)."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lillama import quantizer
from lillama.errors import LillamaError
from lillama.plan import Plan
from lillama.source import Source
from lillama.store import RunDirectory, atomic_directory

SHARD_BYTES = 5_000_000_000
# Written anew, or weights in formats that would shadow ours.
NOT_COPIED = ("config.json", "model.safetensors.index.json", "README.md")


@dataclass
class _Entry:
    """One tensor of the checkpoint: its size is known before it is read."""

    name: str
    bytes: int
    read: Callable[[], Tensor]


def write(source: Source, plan: Plan, run: RunDirectory, layer_files: list[str], target: Path, card: str) -> None:
    """Write the compressed model to the directory `target`, which appears whole or not at all.

    Untouched tensors are copied from the original's files under their own names; finished layers come from
    `layer_files` of the run. Weights are cast to the source's dtype.
    """
    entries = _entries(source, plan, run, layer_files)
    with atomic_directory(target) as directory:
        _write_shards(entries, directory)
        config = copy.deepcopy(source.config)
        config.dtype = source.dtype
        config.architectures = [type(source.model).__name__]
        config.quantization_config = quantizer.LillamaConfig(plan.modules())
        config.save_pretrained(directory)
        assert source.directory is not None
        copy_beside(source.directory, directory)
        (directory / "README.md").write_text(card, encoding="utf-8")


def _entries(source: Source, plan: Plan, run: RunDirectory, layer_files: list[str]) -> list[_Entry]:
    size = torch.empty((), dtype=source.dtype).element_size()
    replaced = {f"{name}.{part}" for name in plan.ranks for part in ("weight", "bias")}
    entries: list[_Entry] = [_Entry(f"{name}.weight", 0, quantizer.marker) for name in plan.ranks]
    for file in layer_files:
        layer = Path(file).name[5:].removesuffix(".safetensors")
        dense = {}
        with safe_open(run.path / file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = f"{layer}.{key}"
                module, _, _ = name.rpartition(".")
                if module in plan.ranks:
                    numbers = tensors.get_slice(key)
                    count = torch.Size(numbers.get_shape()).numel()
                    entries.append(_Entry(name, count * size, _reader(run.path / file, key, source.dtype)))
                else:
                    dense[name] = (run.path / file, key)
        # A layer's other parameters may have been trained: they replace the original's.
        for name, (path, key) in dense.items():
            for out_name, count, read in _as_in_the_file(source, name, path, key):
                entries.append(_Entry(out_name, count * size, read))
            replaced.add(name)
    for name, parts in source.index.items():
        if name not in replaced:
            for path, key in parts:
                with safe_open(path, "pt") as tensors:
                    count = torch.Size(tensors.get_slice(key).get_shape()).numel()
                entries.append(_Entry(key, count * size, _reader(path, key, source.dtype)))
    return entries


def _as_in_the_file(source: Source, name: str, path: Path, key: str) -> list[tuple[str, int, Callable[[], Tensor]]]:
    """A dense tensor under the name (or names) the original's files use for it."""
    parts = source.index.get(name, [])
    if len(parts) == 1:
        with safe_open(path, "pt") as tensors:
            count = torch.Size(tensors.get_slice(key).get_shape()).numel()
        return [(parts[0][1], count, _reader(path, key, source.dtype))]
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(source.model, {name: _reader(path, key, source.dtype)()})
    return [(out, tensor.numel(), functools.partial(_given, tensor)) for out, tensor in reverted.items()]


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _reader(path: Path, key: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return read


def _write_shards(entries: list[_Entry], directory: Path) -> None:
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        save_file(
            {e.name: e.read().contiguous() for e in shards[0]},
            directory / "model.safetensors",
            {"format": "pt"},
        )
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({e.name: e.read().contiguous() for e in shard}, directory / file, {"format": "pt"})
        weight_map |= {e.name: file for e in shard}
    index = {"metadata": {"total_size": sum(e.bytes for e in entries)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_beside(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of `source` (tokenizer, processor, settings), less what `target` has."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
        if file.is_file() and wanted and file.name not in NOT_COPIED and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def load(path: str | Path, **options: Any) -> Any:
    """Load a checkpoint written by a run, strictly.

    `options` go to `from_pretrained` (dtype, device_map, ...). Raises LillamaError when the directory is not such
    a checkpoint, or when any tensor is missing, unexpected or of the wrong shape.
    """
    import transformers

    path = Path(path)
    if not (path / "config.json").is_file():
        hint = f"Did you mean '{path / 'model'}'?" if (path / "model" / "config.json").is_file() else None
        raise LillamaError("there is no checkpoint here (no config.json)", where=str(path), hint=hint)
    config = json.loads((path / "config.json").read_text())
    name = (config.get("architectures") or [None])[0]
    auto = getattr(transformers, name, None) if name else None
    if auto is None:
        raise LillamaError(f"transformers has no model class '{name}'", where=str(path / "config.json"))
    options.setdefault("dtype", "auto")
    try:
        model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    except RuntimeError as error:  # transformers on wrong shapes
        raise LillamaError(f"the weights do not fit: {error}", where=str(path)) from error
    troubles = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if troubles:
        kind, names = next(iter(troubles.items()))
        raise LillamaError(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}",
            where=str(path),
            hint="The checkpoint is damaged or incomplete; write it again.",
        )
    return model


def export_dense(path: str | Path, target: str | Path) -> None:
    """Multiply the factors back and save a model that plain transformers loads: it runs anywhere and saves nothing."""
    path, target = Path(path), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LillamaError("the directory exists and is not empty", where=str(target), hint="Name a new one.")
    model = load(path)
    if getattr(model, "hf_quantizer", None) is None:
        raise LillamaError("this checkpoint holds no factors", where=str(path))
    model.dequantize()
    if target.exists():
        target.rmdir()
    with atomic_directory(target) as directory:
        model.save_pretrained(directory)
        copy_beside(path, directory)


def file_bytes(path: Path) -> int:
    """Bytes of the weights of a checkpoint directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
