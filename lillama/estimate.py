"""What a run will need, estimated before it starts: memory, disk, time. (Parameter counts are exact, these are not.)"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lillama.device import Device
from lillama.plan import Plan, stored
from lillama.recipe import Recipe
from lillama.source import Source
from lillama.student import needs

PROCESS_BYTES = 700_000_000  # Python, torch and transformers themselves, on a CPU


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory on the working device, bytes of disk, and seconds (None: the number of tokens is unknown)."""

    memory: int
    disk: int
    seconds: float | None
    tokens: int | None


def estimate(source: Source, plan: Plan, recipe: Recipe, device: Device) -> Estimate:
    """Estimate a run on this machine. The time rests on a matrix product measured now."""
    work = plan.work
    sizes = {layer.name: _numbers(source, layer.name) for layer in work}
    planned = [layer for layer in work if plan.planned(layer)]
    teacher_bytes = torch.empty((), dtype=source.working).element_size()
    widest = max((w.shape[1] for layer in work for w in layer.weights), default=0)
    width = getattr(source.config.get_text_config(), "hidden_size", widest)
    tokens = recipe.calibration.tokens
    batch = recipe.distill.batch_size * recipe.calibration.sequence_length
    streams, _ = needs(recipe)

    factor_numbers = {
        layer.name: sum(stored(w, plan.ranks[w.name], "factors") for w in plan.planned(layer)) for layer in planned
    }
    trained = factor_numbers if recipe.distill.train == "factors" else sizes
    # A student: its weights; and for what trains a gradient, two moments and the best state so far.
    student = {name: 4 * (sizes[name] + 4 * trained[name]) for name in factor_numbers}
    outputs = max((sum(w.shape[0] + w.shape[1] for w in layer.weights) for layer in work), default=0)
    activations = batch * outputs * 4 * (2 if len(streams) == 1 else 3)
    outside = sum(p.numel() for k, p in source.model.named_parameters() if not k.startswith("lm_head")) - sum(
        _numbers(source, layer.name) for layer in plan.layers
    )
    grams = sum({w.group or w.name: 4 * w.shape[1] ** 2 for w in planned[0].weights}.values()) if planned else 0
    if recipe.distill.schedule == "sequential":
        held = 4 * width * (tokens or 0) * (3 if "student" in streams else 2)
        layer_bytes = max((teacher_bytes * sizes[n] + student[n] for n in student), default=0)
        memory = held + layer_bytes + activations + 3 * grams
    else:
        layer_bytes = sum(teacher_bytes * n for n in sizes.values()) + sum(student.values())
        memory = layer_bytes + activations + teacher_bytes * max(outside, 0)
    memory = max(memory, _evaluation_bytes(source, recipe))
    if device.device.type == "cpu":
        memory += PROCESS_BYTES

    out_bytes = torch.empty((), dtype=source.dtype).element_size()
    disk = out_bytes * plan.after + 4 * sum(trained.values()) + (out_bytes * plan.before if source.gguf else 0)
    if recipe.distill.schedule == "concurrent":
        disk += 16 * sum(trained.values())
    seconds = None
    if tokens:
        forward = sum(2 * n for n in sizes.values()) * 2  # the teacher, and the student stream moving on
        train = sum(6 * (sizes[n] - _replaced(plan, n) + factor_numbers[n]) for n in factor_numbers)
        flops = tokens * (forward + train * len(streams) * recipe.distill.epochs)
        seconds = flops / _throughput(device)
    return Estimate(int(memory), int(disk), seconds, tokens)


def _evaluation_bytes(source: Source, recipe: Recipe) -> int:
    whole = sum(p.numel() for p in source.model.parameters()) * torch.empty((), dtype=source.dtype).element_size()
    return whole * 5 // 4 if recipe.evaluate or source.gguf else 0


def _numbers(source: Source, name: str) -> int:
    return sum(p.numel() for p in source.model.get_submodule(name).parameters())


def _replaced(plan: Plan, layer_name: str) -> int:
    layer = next(layer for layer in plan.layers if layer.name == layer_name)
    return sum(w.parameters for w in plan.planned(layer))


def _throughput(device: Device) -> float:
    """Floating-point operations per second of a matrix product as a layer makes them, in its compute type."""
    n = 1024 if device.device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device.device, dtype=device.compute)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        _ = float((a @ a)[0, 0])  # reading a number waits for the device
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best * 0.5  # attention, normalisation, optimiser and memory take about as long again
