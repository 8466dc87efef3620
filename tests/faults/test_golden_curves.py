"""How layers of each family learn has not changed unawares: held-out losses, step by step, beside those kept."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
KEPT = json.loads((GOLDEN / "curves.json").read_text())

spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_there_is_a_curve_of_every_family():
    assert set(KEPT) == {"llama", "inkuba", "mixtral", "mamba", "whisper"} == set(make.CURVES)
    for schedules in KEPT.values():
        assert set(schedules) == set(make.SCHEDULES)
        for layers in schedules.values():
            assert len(layers) >= 2
            # One that does not learn shows nothing.
            assert all(min(losses) < 0.98 * losses[0] for losses in layers.values())


@pytest.mark.parametrize("schedule", make.SCHEDULES)
@pytest.mark.parametrize("family", sorted(KEPT))
def test_layers_learn_as_they_did(family, schedule):
    found, kept = make.curve(family, schedule), KEPT[family][schedule]
    assert found.keys() == kept.keys()
    for layer, losses in kept.items():
        # Not to the last digit: they were measured on another machine.
        assert found[layer] == pytest.approx(losses, rel=1e-3), layer
