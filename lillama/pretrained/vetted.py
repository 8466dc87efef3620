"""What a model's directory says of itself, looked at before any library acts on it.

A directory may come from anybody, and a download may be cut short. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError

AGAIN = "It is damaged, or of another kind: download or write it again."
INDEX = "model.safetensors.index.json"
# What a model cannot be without, and the most there can be: far above what exists, and far below what would make
# building an empty model of it take the machine's memory, or an hour.
_POSITIVE = re.compile(
    r"hidden_size|d_model|n_embd|vocab_size|intermediate_size|head_dim|num_attention_heads|num_key_value_heads|n_head"
    r"|num_hidden_layers|n_layers?|state_size"
)
_MOST = (
    (re.compile(r".*(_layers|n_layer)"), 4096),
    (re.compile(r".*(_experts|num_labels|_heads|n_head)"), 1 << 16),
    (re.compile(r".*(_size|_dim|d_model|n_embd|_ffn_dim|_rank|n_positions|_embeddings|_positions)"), (1 << 31) - 1),
)
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises LillamaError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LillamaError(f"this is not JSON: {error}", where=str(file), hint=AGAIN) from error
    if not isinstance(found, dict):
        raise LillamaError(f"this holds a {type(found).__name__}, not an object", where=str(file), hint=AGAIN)
    return found


def check_config(raw: Any, where: str, trust: bool = False) -> None:
    """LillamaError for a config.json that cannot be a model's, or would have code from elsewhere run unless `trust`."""
    if not isinstance(raw, dict):
        raise LillamaError(f"the configuration is a {type(raw).__name__}, not an object", where=where, hint=AGAIN)
    for key, value in _pairs(raw):
        name = key.rpartition(".")[2]
        _check_number(name, value, f"{where}: {key}")
        if re.search(r"(attn|attention|experts)_implementation", key) and isinstance(value, str) and "/" in value:
            if trust:
                continue
            raise LillamaError(
                f"it asks for '{value}', code that would be downloaded and run",
                where=f"{where}: {key}",
                hint="Remove the key; --trust-remote-code (model.trust_remote_code: true) allows it.",
            )
    named = raw.get("transformers_weights")
    if named is not None and (not isinstance(named, str) or set(named) & set("/\\") or not _is_safetensors(named)):
        raise LillamaError(f"these weights are not read: {named!r}", where=f"{where}: transformers_weights", hint=AGAIN)
    for key, kinds in {"model_type": str, "auto_map": dict, "architectures": list, "quantization_config": dict}.items():
        if raw.get(key) is not None and not isinstance(raw[key], kinds):
            what = f"this is a {type(raw[key]).__name__} where a {kinds.__name__} belongs"
            raise LillamaError(what, where=f"{where}: {key}", hint=AGAIN)


def _is_safetensors(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _pairs(held: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration and those inside it."""
    items = held.items() if isinstance(held, dict) else [("", one) for one in held] if isinstance(held, list) else ()
    for key, value in items:
        name = ".".join(part for part in (prefix, str(key)) if part)
        yield name, value
        if depth < 8:
            yield from _pairs(value, name, depth + 1)


def _check_number(name: str, value: Any, where: str) -> None:
    needed = _POSITIVE.fullmatch(name) and value is not None and not isinstance(value, list)
    if needed and (type(value) is not int or value <= 0):
        raise LillamaError(f"{value!r} is not a whole number above 0", where=where, hint=AGAIN)
    most = next((limit for pattern, limit in _MOST if pattern.fullmatch(name)), None)
    if most is not None and isinstance(value, int) and value > most:
        said = f"{value:,}" if value < 1 << 63 else "this"
        raise LillamaError(f"{said} is more than any model has (at most {most:,})", where=where, hint=AGAIN)


def check_directory(directory: Path) -> None:
    """LillamaError for a directory whose weights are others than those that are looked at."""
    if (directory / "adapter_config.json").exists():
        raise LillamaError(
            "an adapter stands beside the model, which may name another model",
            where=str(directory / "adapter_config.json"),
            hint="Merge it into the model (peft's merge_and_unload), or move its files elsewhere.",
        )
    if shards := sorted(file.name for file in directory.iterdir() if _SHARD.fullmatch(file.name)):
        what = f"'{shards[0]}' is a shard of a distributed checkpoint, which is not read"
        raise LillamaError(what, where=str(directory), hint="Save the model with save_pretrained.")


def shards_of(directory: Path, whole: bool = True) -> dict[str, list[str]] | None:
    """File -> the tensors it should hold, of a checkpoint with an index; None where there is no index.

    Raises LillamaError for an index that is damaged, names files elsewhere or, unless `whole` is false, missing ones.
    """
    index = directory / INDEX
    if not index.exists():
        return None
    held = read_object(index).get("weight_map")
    if not isinstance(held, dict) or not held or not all(isinstance(name, str) for name in held.values()):
        raise LillamaError("the index has no weight_map of tensors and their files", where=str(index), hint=AGAIN)
    found: dict[str, list[str]] = {}
    for tensor, name in held.items():
        found.setdefault(name, []).append(tensor)
    for name in sorted(found):
        if not name or set(name) & set("/\\\0") or name.startswith(".") or not name.endswith(".safetensors"):
            raise LillamaError(
                f"the index names '{name}', which is no safetensors file beside it", where=str(index), hint=AGAIN
            )
        if whole and not (directory / name).exists():
            raise LillamaError(f"the shard {name} is missing", where=str(directory), hint="Download it again.")
    return found
