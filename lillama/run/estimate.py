"""What a run will need, estimated before it starts: memory, disk, time. (Parameter counts are exact, these are not.)"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lillama.base.device import Device
from lillama.contract import Weight
from lillama.factorise.grams import choose_gram
from lillama.factorise.start import find_needs
from lillama.lowrank.counts import stored
from lillama.plan.plan import Plan, observable, wants_spectra
from lillama.pretrained.source import Source
from lillama.pretrained.streams import budgets, choose
from lillama.recipe.schema import Recipe

SINGLE = 3  # times that a product in float32 takes longer than one in the compute type, about
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
    streams, names, fisher = find_needs(recipe)

    factor_numbers = {
        layer.name: sum(stored(w, plan.ranks[w.name], "factors") for w in plan.planned(layer)) for layer in planned
    }
    # A student: its weights; and for what trains two moments, and (of one layer at a time) a gradient. The best state
    # so far stays on the host.
    rest = {name: sizes[name] - _replaced(plan, name) for name in factor_numbers}
    trained = factor_numbers if recipe.distill.train == "factors" else {n: rest[n] + factor_numbers[n] for n in rest}
    low = recipe.run.low_memory  # best states are in files then
    best = 4 if device.device.type == "cpu" and not low else 0
    student = {n: 4 * (rest[n] + factor_numbers[n]) + (8 + best) * trained[n] for n in factor_numbers}
    gradient = 4 * max(trained.values(), default=0)
    # Of a layer's experts, a token passes through a few.
    chosen = getattr(source.config.get_text_config(), "num_experts_per_tok", None) or 1
    outputs = max((sum(_through(w, chosen) for w in layer.weights) for layer in work), default=0)
    activations = batch * outputs * 4 * (2 if len(streams) == 1 else 3)
    outside = sum(p.numel() for k, p in source.model.named_parameters() if not k.startswith("lm_head")) - sum(
        _numbers(source, layer.name) for layer in plan.layers
    )
    grams = _gram_bytes(plan.planned(planned[0]), names) if planned else 0
    if recipe.distill.schedule == "sequential":
        held = teacher_bytes * width * (tokens or 0) * (3 if "student" in streams else 2)
        device_bytes, host_bytes = budgets(recipe.run.stream_device_memory, recipe.run.stream_memory, device.device)
        place = choose(held, device_bytes, host_bytes)
        in_files = held if place == "file" else 0
        if place != ("host" if device.device.type == "cpu" else "device"):
            held = 0
        layer_bytes = max((teacher_bytes * sizes[n] + student[n] for n in student), default=0)
        # Teacher weights are gathered from several tensors; a gradient is made when the Grams are gone.
        memory = held + layer_bytes + activations + max(gradient, 3 * grams)
    else:
        teachers = [teacher_bytes * n for n in sizes.values()]
        layer_bytes = (max(teachers, default=0) if low else sum(teachers)) + sum(student.values())
        memory = layer_bytes + activations + gradient + teacher_bytes * max(outside, 0)
    memory = max(memory, _evaluation_bytes(source, recipe), _finetuning_bytes(source, plan, recipe))
    if device.device.type == "cpu":
        memory += PROCESS_BYTES

    out_bytes = torch.empty((), dtype=source.dtype).element_size()
    disk = out_bytes * plan.after + 4 * sum(trained.values()) + (out_bytes * plan.before if source.gguf else 0)
    if recipe.distill.schedule == "sequential":
        disk += in_files
    else:
        disk += 16 * sum(trained.values())
    measured = wants_spectra(recipe.compress) or bool(fisher)
    squares = sum(w.copies * min(w.shape) ** 2 for layer in plan.layers for w in observable(layer))
    disk += 8 * squares * measured
    sums = 4 * squares * SINGLE  # of both factors, in float32
    seconds = None
    if tokens:
        seen = tokens if recipe.distill.epochs else min(tokens, recipe.compress.gram_tokens) if names else 0
        forward = sum(2 * n for n in sizes.values()) * 2  # the teacher, and the student stream moving on
        train = sum(6 * (sizes[n] - _replaced(plan, n) + factor_numbers[n]) for n in factor_numbers)
        flops = seen * (forward + train * len(streams) * recipe.distill.epochs) + _finetuning(source, plan, recipe)
        flops += min(tokens, recipe.compress.fisher_tokens) * (3 * sum(2 * n for n in sizes.values()) + sums) * measured
        seconds = flops / _throughput(device, batch)
    return Estimate(int(memory), int(disk), seconds, tokens)


def _finetuning(source: Source, plan: Plan, recipe: Recipe) -> float:
    """Operations of fine-tuning on text: 6 per parameter and token, and 2 where the original predicts as well."""
    section = recipe.finetune
    if section is None or source.config.is_encoder_decoder:
        return 0.0
    tokens = section.tokens or recipe.calibration.tokens or 0
    if section.steps:
        updates = section.steps * section.batch_size * section.gradient_accumulation * section.sequence_length
    else:
        updates = tokens * section.epochs
    return float(updates) * (6 * plan.after + 2 * plan.before * (section.teacher > 0))


def _finetuning_bytes(source: Source, plan: Plan, recipe: Recipe) -> int:
    """Weights, gradients and two moments of everything, the original where it predicts, and the logits of a batch."""
    section = recipe.finetune
    if section is None:
        return 0
    teacher = plan.before * torch.empty((), dtype=source.working).element_size() if section.teacher else 0
    tokens = section.batch_size * (0 if source.config.is_encoder_decoder else section.sequence_length)
    return 16 * plan.after + teacher + 16 * tokens * int(source.config.get_text_config().vocab_size)


def _evaluation_bytes(source: Source, recipe: Recipe) -> int:
    if not (recipe.evaluate or source.gguf):
        return 0
    whole = sum(p.numel() for p in source.model.parameters()) * torch.empty((), dtype=source.dtype).element_size()
    # Logits of the evaluators' usual four windows of 512 tokens, and what is computed from them.
    vocabulary = source.config.get_text_config().vocab_size
    return whole * 5 // 4 + 2048 * vocabulary * 4 * 2


def _through(weight: Weight, chosen: int) -> int:
    """Numbers that go into and come out of a weight per token."""
    if weight.kind == "embedding":  # token ids go in
        return weight.shape[1]
    return sum(weight.shape) * (min(chosen, weight.copies) if weight.kind == "experts" else 1)


def _gram_bytes(weights: Sequence[Weight], wanted: Iterable[str]) -> int:
    """Bytes of the Gram matrices of a layer's planned weights; none where the initialiser wants none."""
    sizes = {}
    for weight in weights if set(wanted) else ():
        output = choose_gram(weight, weights, wanted) == "output_gram"
        key = weight.name if output else weight.group or weight.name
        sizes[key] = 4 * weight.copies * weight.shape[0 if output else 1] ** 2
    return sum(sizes.values())


def _numbers(source: Source, name: str) -> int:
    return sum(p.numel() for p in source.model.get_submodule(name).parameters())


def _replaced(plan: Plan, layer_name: str) -> int:
    layer = next(layer for layer in plan.layers if layer.name == layer_name)
    return sum(w.shape[0] * w.shape[1] * w.copies for w in plan.planned(layer))  # a tied one's too


def _throughput(device: Device, tokens: int) -> float:
    """Floating-point operations per second of a matrix product as a layer makes them for a batch."""
    n = 1024 if device.device.type == "cpu" else 4096
    a = torch.randn(min(max(tokens, 64), n), n, device=device.device, dtype=device.compute)
    b = torch.randn(n, n, device=device.device, dtype=device.compute)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        _ = float((a @ b)[0, 0])  # reading a number waits for the device
        best = max(best, 2 * len(a) * n**2 / (time.perf_counter() - start))
    # Attention, normalisation, optimiser and memory take longer again: of SmolLM2-135M on two cores a third was left.
    return best / 3
