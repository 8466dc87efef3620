"""How long a run will take, estimated before it starts from what it computes and a matrix product measured now."""

from __future__ import annotations

import time

import torch

from lillama.base.device import Device
from lillama.evaluate.context import chosen_evaluators
from lillama.factorise.rounding import kept_numbers
from lillama.plan.plan import Plan, factor_numbers, larger_numbers, observable
from lillama.pretrained.source import Source
from lillama.recipe.schema import Recipe
from lillama.run import disk, fewbits
from lillama.run.counts import Counts

SINGLE = 3  # times that a product in float32 takes longer than one in the compute type, about
# Of a weight of N x n, n <= N, in products of the compute type: the eigenvectors of both factors and the spectrum, in
# float64, for N n^2. Measured of SmolLM2-135M: 31 seconds for 210 weights.
FACTORISING = 70
NARROWING = 30  # the same where a weight is tried in several widths, for n N^2: 61 seconds for 90 weights
UNPACKED = 8e6  # numbers of a GGUF file per second
# Bytes per second at which a model's weights are read for one new token, by the kind of device: on two CPU cores as
# measured; others are guessed, and next to nothing.
READING = {"cpu": 8e9}
FAST = 1e12


def seconds(run: Counts) -> float | None:
    """Seconds on this machine; None where it is unknown how much data there is."""
    tokens = run.recipe.calibration.known_tokens
    if not tokens:
        return None
    computed = operations(run, tokens) + _factorising(run) + _predicted(run)
    return computed / throughput(run.device, run.batch) + _writing(run) + _timing(run) + _unpacking(run.source)


def operations(run: Counts, tokens: int) -> float:
    """Floating-point operations of the run on so many tokens of calibration."""
    compress, epochs = run.recipe.compress, run.recipe.distill.epochs
    seen = tokens if epochs else min(tokens, compress.gram_tokens) if run.grams else 0
    once = sum(2 * count for count in run.numbers.values())
    train = sum(6 * (run.rest[name] + run.factors[name]) for name in run.factors)
    # The teacher, and the student stream moving on.
    flops = seen * (2 * once + train * len(run.streams) * epochs)
    sums = 4 * factor_numbers(run.plan.layers) * SINGLE  # of both factors, in float32
    if run.foretold:
        sums += 2 * sum(kept_numbers(w) for layer in run.plan.layers for w in observable(layer)) * SINGLE
    alone = sums // 2
    if run.narrows:
        # Products as large as these go nearly as fast as the one that is measured, of which a third is counted on.
        sums += larger_numbers(run.plan.layers)
        alone += larger_numbers(run.plan.layers, entries=False)
    flops += min(tokens, compress.fisher_tokens) * (3 * once + sums) * run.measured
    flops += disk.inputs_alone(run.recipe, tokens) * (once + alone) * run.measured
    return flops + _finetuning(run.source, run.plan, run.recipe) + fewbits.operations(run)


def _finetuning(source: Source, plan: Plan, recipe: Recipe) -> float:
    """Operations of fine-tuning on text: 6 per parameter and token, and 2 where the original predicts as well."""
    section = recipe.finetune
    if section is None or source.config.is_encoder_decoder:
        return 0.0
    tokens = section.tokens or recipe.calibration.known_tokens or 0
    if section.steps:
        updates = section.steps * section.batch_size * section.gradient_accumulation * section.sequence_length
    else:
        updates = tokens * section.epochs
    return float(updates) * (6 * plan.after + 2 * plan.before * (section.teacher > 0))


def _writing(run: Counts) -> float:
    """Seconds in which the model writes its own text, a token of every text of a round at a time."""
    section, written = run.recipe.calibration.generate, run.recipe.calibration.written
    if section is None:
        return 0.0
    return 2 * run.plan.before * written / throughput(run.device, section.batch, least=1)


def _factorising(run: Counts) -> float:
    """Operations that finding spectra and factors by the predictions' sensitivity takes."""
    if not run.measured:
        return 0.0
    weights = [weight for layer in run.planned for weight in observable(layer)]
    found = float(FACTORISING * sum(w.copies * min(w.shape) ** 2 * max(w.shape) for w in weights))
    return found + (_narrowing(run) if run.narrows else 0.0)


def _narrowing(run: Counts) -> float:
    """Operations in which MLPs are tried in several widths: the spectra of their weights, and which neurons go."""
    found = 0.0
    for layer in run.plan.layers:
        for name in (name for mlp in layer.neurons for name in mlp.weights):
            small, large = sorted(run.plan.weights[name].shape)
            found += NARROWING * small * large**2
    return found


def _predicted(run: Counts) -> float:
    """Operations of the evaluators that say how many tokens they read: perplexity."""
    plan, results = run.plan, _results(run.recipe)
    found = 0
    for _, _, options in chosen_evaluators(run.recipe.evaluate, in_turn=False):
        read = options.get("tokens")
        found += 2 * (plan.before + results * plan.after) * (read if isinstance(read, int) else 0)
    return float(found)


def _timing(run: Counts) -> float:
    """Seconds in which speed is measured: every new token reads all weights once, of every model in turn."""
    plan, results = run.plan, _results(run.recipe)
    weights = run.source.dtype.itemsize * (plan.before + results * plan.after)
    found = 0
    for _, _, options in chosen_evaluators(run.recipe.evaluate, in_turn=True):
        found += weights * (options.get("repeats", 3) + 1) * options.get("new_tokens", 32)
    return found / READING.get(run.device.device.type, FAST)


def _results(recipe: Recipe) -> int:
    """How many models come out, each of which is measured."""
    return 1 + (recipe.finetune is not None) + (recipe.quantize is not None)


def _unpacking(source: Source) -> float:
    """Seconds in which the weights of a GGUF file become numbers."""
    return source.parameters / UNPACKED if source.gguf else 0.0


def throughput(device: Device, tokens: int, least: int = 64) -> float:
    """Floating-point operations per second of a matrix product as a layer makes them for a batch of tokens."""
    n = 1024 if device.device.type == "cpu" else 4096
    a = torch.randn(min(max(tokens, least), n), n, device=device.device, dtype=device.compute)
    b = torch.randn(n, n, device=device.device, dtype=device.compute)
    best = 0.0
    for _ in range(4 if tokens < 256 else 24):  # the first ones of a machine that was idle are slow
        start = time.perf_counter()
        _ = float((a @ b)[0, 0])  # reading a number waits for the device
        best = max(best, 2 * len(a) * n**2 / (time.perf_counter() - start))
    # Attention, normalisation, optimiser and memory take longer again: of SmolLM2-135M on two cores a third was left.
    return best / 3
