"""What tells one model in a directory from another: the content of what decides its numbers, never dates or places."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lillama.base.files import checksum, sha256
from lillama.errors import LillamaError

# What stands beside the weights and goes with them: configuration, tokenizer, processor, settings of generation.
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
INDIFFERENT = ("_name_or_path", "transformers_version")  # keys of config.json that decide nothing
LONG = 200  # characters of a value beyond which its hash stands for it
WORKERS = 4  # files hashed at once: hashing lets other threads work


def of(directory: Path, gguf: str | None, code: bool) -> dict[str, Any]:
    """{name of a file: its hash} of the model in a directory, config.json key by key, so that a change has a name.

    `gguf` names the one file of a GGUF model; `code` includes the modelling code there, which is to run.
    """
    if gguf:
        return {gguf: sha256(directory / gguf)}
    names = [path for path in sorted(directory.iterdir()) if path.is_file()]
    kinds = (*BESIDE, ".safetensors", *((".py",) if code else ()))
    wanted = [path for path in names if path.suffix in kinds]
    with ThreadPoolExecutor(WORKERS) as pool:
        return {path.name: value for path, value in zip(wanted, pool.map(_content, wanted))}


def _content(path: Path) -> Any:
    """What a file says: of JSON neither spaces nor the order of keys count."""
    try:
        if path.suffix != ".json":
            return sha256(path)
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise LillamaError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError:  # whoever needs the file will say what is wrong with it
        return sha256(path)
    if path.name == "config.json" and isinstance(data, dict):
        return {key: _short(value) for key, value in data.items() if key not in INDIFFERENT}
    return checksum(data)


def _short(value: Any) -> Any:
    return value if len(json.dumps(value)) <= LONG else checksum(value)
