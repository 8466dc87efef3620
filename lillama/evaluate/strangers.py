"""A recipe that lies in the directory it measures: it may come from anybody, so it must not make code run.

It may name evaluators, and files and hub data sets as data. What could run code is the user's to ask for: in a recipe
of their own, by --set, or by --trust-remote-code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe

PACKAGE = "package:"
PLAIN = frozenset({"package:pydoc_data.topics"})  # of Python's own library, and text alone
Key = tuple[str, ...]


def check(recipe: Recipe, overrides: Sequence[str], file: Path) -> None:
    """LillamaError where `recipe`, read from `file` in a directory, would run code that `overrides` do not ask for."""
    if recipe.model.trust_remote_code:
        return
    asked = [tuple(override.partition("=")[0].strip().split(".")) for override in overrides]
    for key, what in _code(recipe):
        if not any(key[: len(one)] == one for one in asked):
            raise LillamaError(
                f"{what}, and this recipe came with the directory",
                where=f"{file}: {'.'.join(key)}",
                hint="Where you trust it: --recipe FILE with a recipe of your own, or --trust-remote-code.",
            )


def _code(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """(key, what it does) of all that may run code while the model is measured."""
    for name, options in recipe.evaluate.items():
        for key, value in _leaves(options, ("evaluate", name)):
            if name.partition("/")[0] == "harness" and key[2] == "include" and value is not None:
                yield key, f"tasks in the folder '{value}' can run code"
            if isinstance(value, str) and value.startswith(PACKAGE) and value not in PLAIN:
                yield key, f"'{value}' imports a module"


def _leaves(held: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    inside = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list | tuple) else None
    if inside is None:
        yield key, held
        return
    for name, value in inside:
        yield from _leaves(value, (*key, str(name)))


def check_model(recipe: Recipe, file: Path) -> None:
    """LillamaError where finding the model that `recipe`, read from `file`, names would import a package."""
    name = recipe.model.id
    if name.startswith(PACKAGE) and "." in name and not recipe.model.trust_remote_code:
        raise LillamaError(
            f"'{name}' imports a package, and this recipe came with the directory",
            where=f"{file}: model.id",
            hint="Where you trust it: give both models, ORIGINAL COMPRESSED, or --trust-remote-code.",
        )
