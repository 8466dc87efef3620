"""Of which layers a run must know how they are driven (pretrained/forms.py)."""

from __future__ import annotations

from dataclasses import replace

from lillama.factorise.start import find_needs
from lillama.plan.plan import Plan
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Recipe


def needed(walk: Walk, plan: Plan, recipe: Recipe) -> Walk:
    """The walk of the whole model less what is never run: where no predictions are asked, layers above the planned."""
    everything = plan.provisional or find_needs(recipe).fisher
    return walk if everything else replace(walk, layers=plan.work)
