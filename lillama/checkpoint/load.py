"""The compressed checkpoint, loaded strictly (docs/checkpoint.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError


def load(path: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a checkpoint written by a run, strictly.

    `trust_remote_code` allows the checkpoint's own modelling code to run, where the original came with some; other
    `options` go to `from_pretrained` (dtype, device_map, ...). Raises LillamaError when the directory is not such a
    checkpoint, or when any tensor is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        hint = f"Did you mean '{path / 'model'}'?" if (path / "model" / "config.json").is_file() else None
        raise LillamaError("there is no checkpoint here (no config.json)", where=str(path), hint=hint)
    auto, options = _class_of(path, trust_remote_code, options)
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


def _class_of(path: Path, trust: bool, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(what opens the checkpoint at `path`, with which options): transformers' own class, or the one its code has."""
    import transformers

    where = path / "config.json"
    config = json.loads(where.read_text(encoding="utf-8"))
    name = str((config.get("architectures") or [None])[0])
    own = {str(code).rpartition(".")[2]: auto for auto, code in (config.get("auto_map") or {}).items()}
    if name in own and trust:
        return getattr(transformers, own[name]), {**options, "trust_remote_code": True}
    if (found := getattr(transformers, name, None)) is not None:
        return found, options
    raise LillamaError(
        f"transformers has no model class '{name}'",
        where=str(where),
        hint="It comes with the model's own code: trust_remote_code=True runs that." if name in own else None,
    )
