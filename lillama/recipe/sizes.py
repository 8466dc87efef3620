"""The two ways to say how small a model is to become, and what goes with them: one of them, and never both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lillama.errors import LillamaError
from lillama.recipe.explain import Origin, together


def check_sizes(recipe: BaseModel, origin: Origin) -> None:
    """LillamaError unless the recipe says once how small the model is to become, in words that go together."""
    values: Any = recipe
    if getattr(values, "compress", None) is not None and (errors := list(_refused(values, origin))):
        raise together(errors)


def _refused(recipe: Any, origin: Origin) -> Iterator[LillamaError]:
    compress, quantize = recipe.compress, recipe.quantize
    if compress.size is None:
        if compress.reduction is None:
            where = origin.document.where(("compress", "reduction"))
            yield LillamaError("the key 'compress.reduction' is missing", where=where, hint="Add it, or compress.size.")
        if quantize is not None and quantize.bits == "auto":
            yield LillamaError(
                "bits: auto shares out the bytes of compress.size, which is not given",
                where=origin.where(("quantize", "bits")),
                hint="Give compress.size in place of compress.reduction, or bits: 4 or 8.",
            )
        return
    if compress.reduction is not None:
        yield LillamaError(
            "compress.size and compress.reduction both say how small the model is to become",
            where=origin.where(("compress", "size")),
            hint="Leave one of them out (--set compress.reduction=null).",
        )
    if compress.strategy != "fisher":
        yield LillamaError(
            f"the strategy '{compress.strategy}' counts parameters and cannot share out bytes",
            where=origin.where(("compress", "strategy")),
            hint="With compress.size use strategy: fisher; the others go with compress.reduction.",
        )
    if compress.of != "model":
        yield LillamaError(
            "compress.size is a share of the whole model's bytes",
            where=origin.where(("compress", "of")),
            hint="Leave compress.of out.",
        )
    if quantize is not None and not quantize.fitted:
        yield LillamaError(
            "what rounding to nearest costs is not foretold, so compress.size cannot count with it",
            where=origin.where(("quantize", "method")),
            hint="Use quantize.method: compensated.",
        )
