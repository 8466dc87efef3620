"""Rows from the hub, by the name of a data set there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lillama.data.rows import first_line
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from datasets import Dataset


def read_hub(dataset: str, config: str | None, split: str, where: str) -> Dataset:
    """The rows of `split` of a data set on the hub. Raises LillamaError that says what the hub or datasets refuses."""
    import datasets

    local = f"Give a local file instead: --set {where}.dataset=FILE."
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise LillamaError(
            f"the hub has no data set '{dataset}' that you may read ({first_line(error)})",
            where=f"{where}.dataset",
            hint=f"Check the name, log in if it is private or gated. {local}",
        ) from error
    except Exception as error:
        message, key, hint = first_line(error), "dataset", local
        unreachable = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
            ("httpx", "requests")
        )
        if unreachable:
            what = f"the hub is not reachable, so '{dataset}' cannot be read: {message}"
        elif isinstance(error, RuntimeError) and "scripts" in str(error):
            what = f"'{dataset}' is a script, which datasets {datasets.__version__} does not run"
        else:
            what = f"'{dataset}' cannot be read: {message}"
            available = re.search(r"\[[^\[\]]*\]", str(error))
            if isinstance(error, ValueError) and re.search(r"[Ss]plit|[Cc]onfig", message):
                key = "split" if re.search(r"[Ss]plit", message) else "config"
                hint = f"Available: {available[0][1:-1]}." if available else hint
        raise LillamaError(what, where=f"{where}.{key}", hint=hint) from error
