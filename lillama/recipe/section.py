"""What every section of a recipe is."""

from __future__ import annotations

from pydantic import ConfigDict

from lillama.registry import Options


class Section(Options):
    """A frozen part of the recipe that refuses keys it does not know and text where a number belongs."""

    model_config = ConfigDict(strict=True)
