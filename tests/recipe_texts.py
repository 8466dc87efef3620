"""Recipes as texts, for tests of what is said of them; no plugin is installed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field

from lillama import host, registry
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe

MINIMAL = """\
model: {id: some/model}
compress:
  reduction: 0.3
calibration:
  dataset: text.txt
run:
  out: runs/x
"""
DATA: dict[str, Any] = {
    "model": {"id": "some/model"},
    "compress": {"reduction": 0.3},
    "calibration": {"dataset": "text.txt"},
    "run": {"out": "runs/x"},
}


def measure(
    model: Any,
    *,
    dataset: Annotated[str, Field(description="Text.")] = "d",
    tokens: Annotated[int | None, Field(description="Tokens.")] = None,
    lengths: Annotated[tuple[int, ...], Field(description="Lengths.")] = (1,),
) -> dict[str, float]:
    """A stand-in for an evaluator."""
    return {}


@pytest.fixture(autouse=True, scope="module")
def _no_plugins() -> Iterator[None]:
    """No installed plugin has a say, and there is an evaluator `measure`."""
    alone = host.Host(entry_points=[], only=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "get", lambda: alone)
        registry.discover_again()
        patch.setattr(registry.EVALUATORS, "_targets", {**registry.EVALUATORS._targets, "measure": measure})
        yield
    registry.discover_again()


def refused(text: str | dict[str, Any], *overrides: str) -> LillamaError:
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(text, overrides)
    return caught.value


def with_lines(*lines: str) -> str:
    return MINIMAL + "\n".join(lines)


# Keys
