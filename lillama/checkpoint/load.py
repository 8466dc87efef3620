"""The compressed checkpoint, loaded strictly (docs/checkpoint.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError


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
