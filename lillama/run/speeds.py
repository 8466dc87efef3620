"""How fast this machine computes, measured now, in a second: what the time of a run is estimated from."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lillama.base.device import Device, factorising, synchronise
from lillama.base.threads import side_by_side
from lillama.factorise.initialisers import fisher_spectrum
from lillama.run.counts import Counts

SIDE = {"cpu": 1024}  # of a matrix or a batch that is tried, at most
LARGE_SIDE = 4096  # the same, on a card
DECOMPOSED = 512  # rows of a matrix that is decomposed, at most
LONG_ENOUGH = 0.15  # seconds: the first products of a machine that was idle are slow


class Speeds(NamedTuple):
    """Operations per second of this machine, and for decompositions numbers n^2 N of matrices n x N, n <= N."""

    forward: float  # products of a layer's weights with a batch, in the type that products run in
    learning: float  # the same with all gradients
    single: float  # the same in float32
    evaluating: float  # the same in the type of the checkpoint
    decomposing: float  # spectra of a weight by both factors of its Fisher information, in float64, on all cores


def measure_speeds(run: Counts) -> Speeds:
    """Try the products of a layer of the run's model, cut to a size that takes no time."""
    device = run.device
    most = SIDE.get(device.device.type, LARGE_SIDE)
    layers = sorted((layer for layer in run.plan.work if layer.weights), key=lambda layer: layer.kind != "block")
    found = [weight.shape for weight in layers[0].weights] if layers else [(most, most)]
    shapes = [(min(out, most), min(into, most)) for out, into in found]
    rows = min(max(run.batch, 64), most)
    products = float(2 * rows * sum(out * into for out, into in shapes))
    weights = [torch.randn(shape, device=device.device) for shape in shapes]
    inputs = {into: torch.randn(rows, into, device=device.device) for _, into in shapes}

    def multiply(kind: Device) -> Callable[[], None]:
        def calculate() -> None:
            with torch.no_grad(), kind.autocast():
                for W in weights:
                    F.linear(inputs[W.shape[1]], W)

        return calculate

    def learn() -> None:
        with torch.enable_grad(), device.autocast():
            leaves = [W.requires_grad_(True) for W in weights]
            given = {into: x.detach().requires_grad_(True) for into, x in inputs.items()}
            each = [F.linear(given[W.shape[1]], W) for W in leaves]
            torch.autograd.grad(each, [*leaves, *given.values()], [torch.ones_like(one) for one in each])

    single = products / _least(multiply(Device(device.device, torch.float32)), device.device)
    forward = products / _least(multiply(device), device.device)
    return Speeds(
        forward=forward,
        learning=3 * products / _least(learn, device.device),
        single=single,
        evaluating=single if run.source.dtype == torch.float32 else forward,
        decomposing=_decomposing(device.device, max(shapes, key=lambda shape: shape[0] * shape[1])),
    )


def _decomposing(device: torch.device, shape: tuple[int, int]) -> float:
    """Numbers n^2 N of the weights n x N whose spectra are found in a second, as many at once as there are cores."""
    place, n = factorising(device), min(*shape, DECOMPOSED)
    W = torch.randn(n, min(max(shape), 2 * n), device=place)
    factor = W @ W.T
    tasks = range(torch.get_num_threads() if place.type == "cpu" else 1)

    def calculate() -> None:
        side_by_side(lambda _: fisher_spectrum(W, factor, factor), tasks, place, n)

    return len(tasks) * n * W.numel() / _least(calculate, place)


def _least(calculate: Callable[[], object], device: torch.device) -> float:
    """The least number of seconds that a calculation takes, of several times."""
    calculate()  # makes what is made once
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < 3 or (time.perf_counter() - begun < LONG_ENOUGH and len(found) < 50):
        synchronise(device)
        start = time.perf_counter()
        calculate()
        synchronise(device)
        found.append(time.perf_counter() - start)
    return min(found)
