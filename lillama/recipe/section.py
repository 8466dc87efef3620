"""What every section of a recipe is."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from lillama.registry import Options

REFUSED = "refused"  # the type of a complaint about keys that do not go together


class Section(Options):
    """A frozen part of the recipe that refuses keys it does not know and text where a number belongs."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="after")
    def _together(self) -> Self:
        for what, hint in self._complaints():
            raise PydanticCustomError(REFUSED, "{what}", {"what": what, "hint": hint})
        return self

    def _complaints(self) -> list[tuple[str, str]]:
        """(what, hint) of keys that do not go together; the first is told."""
        return []
