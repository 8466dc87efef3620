"""`--set KEY=VALUE`: one value of a recipe replaced before it is checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lillama.errors import LillamaError
from lillama.recipe import yamlfile
from lillama.recipe.yamlfile import MOST_LEVELS


def plain_copy(value: Any) -> Any:
    """A copy that overrides may change, of what YAML could have held."""
    if isinstance(value, Mapping):
        return {str(key): plain_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_copy(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def noted(overrides: Sequence[str]) -> str:
    """Overrides as comments to stand above the text of a recipe, which does not have them."""
    lines = [f"#   --set {' '.join(override.split())}\n" for override in overrides]
    return "".join(["# Changed on the command line:\n", *lines, "\n"] if lines else [])


def apply_override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Put the value of `override` (KEY=VALUE, read as YAML) into `data`; the path of its key."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise LillamaError(f"'{override}' is not KEY=VALUE", where="--set", hint="For example run.out=runs/mine.")
    if len(path) > MOST_LEVELS:
        raise LillamaError(f"'{override[:60]} ...' has more than {MOST_LEVELS} levels", where="--set")
    *parents, last = path
    for i, part in enumerate(parents):
        child = data.get(part)
        if child is None:
            child = data[part] = {}
        if not isinstance(child, dict):
            raise LillamaError(f"'{'.'.join(parents[: i + 1])}' has no keys below it", where=f"--set {override}")
        data = child
    data[last] = yamlfile.value(text, f"--set {key}")
    return path
