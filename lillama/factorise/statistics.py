"""What initialisers are told of the calibration data."""

from __future__ import annotations

from lillama.contract import Layer

FISHER = "sensitivity"


def fisher_file(layer: Layer) -> str:
    """What sensitivity.py finds of a layer: `<weight>.input`, `<weight>.output`, `<weight>.spectrum`."""
    return f"{FISHER}/{layer.name}.safetensors"
