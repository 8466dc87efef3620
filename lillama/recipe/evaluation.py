"""What a model on disk is measured by where no recipe says so: parts of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lillama.recipe.schema import Model, Readable, Section


class Seeded(Section):
    """How an evaluation happens."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of what evaluators draw.")


class Evaluation(Readable):
    """What a model on disk is measured by where no recipe says so: the keys of a recipe that matter then."""

    model: Model = Field(description="The model to measure.")
    plugin: str = Field("auto", description="Architecture plugin by name; auto: the one that knows the model.")
    evaluate: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Evaluators, each with its options.")
    run: Seeded = Field(default_factory=lambda: Seeded.model_validate({}), description="How the evaluation happens.")
