"""The step into few bits is killed at random instants: the same command ends with the same weights."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import children
import families
import pytest
import storm

PHASES = ("quantize", "what rounding depends on", "evaluate quantized", "finish")


def weights_of(out: Path) -> str:
    return hashlib.sha256((out / "quantized" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_rounds_ends_with_the_same_weights(tmp_path):
    recipe = families.prepare(tmp_path, "llama")
    phases = children.durations(children.run(recipe, tmp_path / "log.txt"))
    assert phases["quantize"] + phases["what rounding depends on"] > storm.SHORT
    case = storm.Case("llama", recipe, children.results(tmp_path / "run"), phases)
    whole, draw, kills = weights_of(case.out), random.Random(0), 0
    for phase in PHASES:
        for path in (case.out / "quantized").iterdir():
            path.unlink()  # all before it is finished: that is what the other storms are about
        (case.out / "metrics.json").unlink()
        if storm.kill_in(case, phase, draw.random()) is not None:
            kills += 1
        assert children.run(recipe, tmp_path / "again.txt").wait() == 0, (tmp_path / "again.txt").read_text()[-600:]
        assert weights_of(case.out) == whole and not storm.whole(case.out)
        assert children.results(case.out) == case.expected
    assert kills >= 2
