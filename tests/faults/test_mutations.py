"""Some of what `mutate_checkpoints.py` does by the hundred."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutate_checkpoints


def test_checkpoints_altered_at_random_are_refused_or_opened_and_nothing_else() -> None:
    found = mutate_checkpoints.run(60, seed=1)
    assert not found.bad(), "\n".join([found.line(), *found.tracebacks, *found.accepted])
    assert found.mutations == 60 and found.refused > 60 and found.opened > 60
    assert found.slowest < 20
