"""Where a device lacks float64, as Apple's does, factors are computed on the host; everything else stays there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lillama import Weight
from lillama.base import device
from lillama.factorise.kfac import Sums
from lillama.factorise.known import WeightStatistics
from lillama.factorise.start import Initialiser
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.storage import get_storage
from lillama.registry import INITIALISERS


class NoFloat64(TorchDispatchMode):
    """A stand-in for such a device: fake tensors on `cuda`, which may never be of float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda" and tensor.dtype == torch.float64:
                raise AssertionError(f"{function} makes float64 on a device that has none")
        return out


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", ("cuda",))
    with FakeTensorMode(), NoFloat64():
        yield torch.device("cuda")


def test_the_stand_in_refuses_what_such_a_device_refuses(card):
    with pytest.raises(AssertionError, match="float64"):
        torch.ones(3, device=card).double()


# A run says before it begins that these serve no embedding.
CASES = [
    (n, k)
    for n in INITIALISERS
    for k in ("linear", "embedding", "experts")
    if k != "embedding" or n not in ("compensated", "asvd")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_initialiser_serves_a_device_without_float64(card, name, kind):
    names, copies = INITIALISERS.needs(name), (3,) if kind == "experts" else ()
    d_out, d_in = 24, 16
    small, side = min(d_out, d_in), d_in if kind == "embedding" else min(d_out, d_in)
    grams = {"gram": d_in, "output_gram": side if kind == "embedding" else d_out, "cross": d_in}
    grams |= {"input_fisher": small, "output_fisher": small}
    known = {n: torch.ones(*copies, size, size, device=card) for n, size in grams.items() if n in names}
    if name == "whitened" and kind == "embedding":
        known = {"counts": torch.ones(d_out)}
    elif name == "whitened":
        known.pop("output_gram")
    start = Initialiser(INITIALISERS.get(name), names, 0)
    weight = Weight("w", (d_out, d_in), kind=kind)
    A, B = start(weight, torch.ones(*copies, d_out, d_in, device=card), 4, WeightStatistics(**known))
    assert A.device.type == B.device.type == "cuda" and A.dtype == torch.float32
    assert A.shape == (*copies, d_out, 4) and B.shape == (*copies, 4, d_in)


def test_sums_of_an_embedding_and_pivots_too(card):
    sums = Sums(torch.ones(16, 24, device=card), embedding=True)
    sums.counted = torch.tensor(3.0)
    sums.count_every_token(0.1)
    assert sums.inputs.device.type == "cuda"
    module = LowRankLinear(get_storage("pivoted"), 16, 24, 4, device=card)
    A, B = module.factors()
    assert A.shape == (24, 4) and B.device.type == "cpu"
