"""The engine: schedules (sequential.py, concurrent.py) over one step (`Student.step`)."""

from __future__ import annotations

from lillama.distill.job import Job, Watch
from lillama.registry import SCHEDULES


def distill(job: Job, watch: Watch | None = None) -> None:
    """Distil every planned layer that is not stored yet, by the recipe's schedule, while `watch` looks on."""
    if not job.is_done:
        SCHEDULES.get(job.recipe.distill.schedule)(job, watch)
