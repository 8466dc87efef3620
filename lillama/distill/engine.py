"""The engine: two schedules (sequential.py, concurrent.py) over one step (`Student.step`)."""

from __future__ import annotations

from lillama import registry
from lillama.distill.job import Job


def distill(job: Job) -> None:
    """Distil every planned layer that is not stored yet, by the recipe's schedule."""
    if all(job.directory.has(job.file(layer)) for layer in job.layers if job.plan.planned(layer)):
        return
    registry.SCHEDULES.get(job.recipe.distill.schedule)(job)
