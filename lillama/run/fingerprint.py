"""What must be the same for stored results to be of use: all that decides a run's numbers."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from lillama.run.prepare import Prepared
from lillama.version import __version__

# Settings of a run that change nothing in its result.
NOT_IN_THE_NUMBERS = {
    "out",
    "low_memory",
    "snapshot_seconds",
    "stream_memory",
    "stream_device_memory",
    "curve",
    "curve_tokens",
    "track",
}

# Settings of few bits on which no rank depends; without compress.size none does.
NOT_IN_THE_BITS = {"tokens", "steps", "learning_rate"}

ANY = object()
# Keys that earlier versions did not know, by section, and the value that says what those did; ANY: what the key decides
# is in the hash of the data.
NEW_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("calibration", "special_tokens", ANY),
    ("calibration", "datasets", None),
    ("calibration", "generate", None),
    ("finetune", "special_tokens", ANY),
    ("compress", "embedding", False),
    ("compress", "keep_dense_below", 0.0),
    ("compress", "size", None),
)


def of(prepared: Prepared, data: str) -> dict[str, Any]:
    """The fingerprint of a run; `data` is that of its batches. Where the model lies is no part of it."""
    import transformers

    unimportant: Any = {
        "evaluate": True,
        "finetune": True,
        "quantize": True if prepared.recipe.compress.size is None else NOT_IN_THE_BITS,
        "run": NOT_IN_THE_NUMBERS,
        "model": {"id"},
    }
    plugin = prepared.plugin
    return {
        "recipe": prepared.recipe.model_dump(mode="json", exclude=unimportant),
        "data": data,
        "model": prepared.source.identity(),
        "plugin": f"{plugin.name} of {plugin.distribution} {plugin.version}",
        "compute": str(prepared.device.compute).removeprefix("torch."),
        "lillama": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def like(new: dict[str, Any], held: dict[str, Any], place: Path) -> dict[str, Any]:
    """`new` in the form that a run of an earlier version has it in, to be compared with that one's, `held`.

    Earlier versions knew the model at `place` by its name and the sizes and dates of its files, of which a date decides
    nothing, and did not note the plugin.
    """
    new = _less_new_keys(new, held)
    if "plugin" in held:
        return new
    compared = copy.deepcopy({key: value for key, value in new.items() if key != "plugin"})
    with contextlib.suppress(KeyError, TypeError, ValueError, OSError):  # of whatever form: then it is another model
        compared["recipe"]["model"]["id"] = held["recipe"]["model"]["id"]
        sizes = {name: about[0] for name, about in held["model"].items() if name not in ("id", "commit")}
        if sizes and all((place / name).stat().st_size == size for name, size in sizes.items()):
            compared["model"] = held["model"]
    return compared


def _less_new_keys(new: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    """`new` without keys of the recipe that there were none of, as far as they say what was done without them."""
    compared = copy.deepcopy(new)
    for section, name, before in NEW_KEYS:
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # of whatever form, or without the section
            given = compared["recipe"][section] or {}
            if name not in (held["recipe"][section] or {}) and (before is ANY or given.get(name) == before):
                given.pop(name, None)
    return compared
