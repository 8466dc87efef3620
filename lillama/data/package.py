"""Rows from the texts of an installed Python module: package:MODULE."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lillama.data.rows import first_line, select_split
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE = "package:"


def read_package(dataset: str, config: str | None, split: str, where: str) -> Dataset | None:
    """The rows of `split` of a module's texts, each text a row; None for a name that is no `package:MODULE`."""
    if not dataset.startswith(PACKAGE):
        return None
    everything = _package_rows(dataset.removeprefix(PACKAGE), where)
    return select_split(split, lambda name: dataset, lambda source: everything, where)


def _package_rows(module: str, where: str) -> Dataset:
    """The largest dict[str, str] or list[str] of an installed module, dicts ordered by key."""
    import datasets

    where = f"{where}.dataset"
    try:
        names = vars(importlib.import_module(module))
    except Exception as error:  # a module may raise anything while it is imported
        raise LillamaError(
            f"the module '{module}' cannot be imported: {first_line(error)}",
            where=where,
            hint="Install the package it comes with, or check the name.",
        ) from error
    candidates = []
    for name in sorted(names):
        value = names[name]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            value = [value[key] for key in sorted(value)]
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            candidates.append(value)
    if not candidates:
        raise LillamaError(
            f"the module '{module}' has no dict[str, str] or list[str] of texts",
            where=where,
            hint="package:pydoc_data.topics is one that has.",
        )
    texts = max(candidates, key=lambda texts: sum(map(len, texts)))
    return datasets.Dataset.from_dict({"text": texts}, info=datasets.DatasetInfo(builder_name="package"))
