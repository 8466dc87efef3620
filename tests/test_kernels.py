"""Kernels that oneDNN makes are kept for as many shapes as a compressed model has, whoever imports lillama."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SHAPES = 700  # of products, two kernels each: more than the 1024 that oneDNN keeps by itself

PASSES = f"""
import {{module}}
import torch
torch.set_num_threads(1)
x = torch.ones(2, 8).to_mkldnn()
weights = [torch.ones(rows, 8).to_mkldnn() for rows in range(1, 1 + {SHAPES})]
for _ in range(2):
    print("pass", flush=True)
    for weight in weights:
        torch.nn.functional.linear(x, weight)
"""


def made_again(module: str) -> int:
    """How many kernels oneDNN makes in the second of two passes over as many shapes, in a process that imports it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    said = subprocess.run(
        [sys.executable, "-c", PASSES.format(module=module)],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    _, first, second = said.split("pass\n")
    assert first.count("cache_miss") >= SHAPES
    return second.count("cache_miss")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_kernels_of_as_many_shapes_as_a_compressed_model_has_are_made_once():
    assert made_again("lillama") == 0
    assert made_again("torch") > 0  # what it is for


def test_the_user_s_own_number_of_kernels_stands():
    said = subprocess.run(
        [sys.executable, "-c", "import lillama, os; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"],
        env=dict(os.environ) | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "77"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "77\n"
