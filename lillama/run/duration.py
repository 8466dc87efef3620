"""How long a run will take, estimated before it starts: what it computes, at speeds measured now (speeds.py)."""

from __future__ import annotations

from lillama.evaluate.context import chosen_evaluators
from lillama.factorise.rounding import kept_numbers
from lillama.plan.plan import factor_numbers, larger_numbers, observable, smaller_numbers
from lillama.recipe.schema import Finetune, Recipe
from lillama.run import disk, fewbits
from lillama.run.counts import Counts
from lillama.run.speeds import measure_speeds

# How much longer a phase takes than its products do: attention, normalisation, sums, memory. Measured of
# SmolLM2-135M (docs/results/quickstart.md).
BESIDES = 1.5
# Of a weight of n x N, n <= N, in decompositions (speeds.py), each of which is that of such a weight once:
FACTORISING = 4  # its spectrum, then its factors and pivots
NARROWING = 13  # the spectra of what is left of it in several widths, and which neurons go
# How much longer a token takes that is written after others than one that is read: products of few rows, keys and
# values that are moved, the draw. 72 texts of SmolLM2-135M at once, on one core.
WRITING = 6
DRAWING = 5e-9  # seconds for every token of the vocabulary at every position where one is drawn
UNPACKED = 20e6  # numbers of a GGUF file per second
OPENED = 30e6  # numbers of a model per second that is written, checked, read again and put together
# Bytes per second at which a model's weights are read for one new token, by the kind of device: on two CPU cores as
# measured; others are guessed, and next to nothing.
READING = {"cpu": 8e9}
FAST = 1e12


def seconds(run: Counts) -> float | None:
    """Seconds on this machine; None where it is unknown how much data there is."""
    found = by_phase(run)
    return None if found is None else sum(found.values())


def by_phase(run: Counts) -> dict[str, float] | None:
    """Seconds that every kind of work takes; None where it is unknown how much data there is."""
    tokens = run.recipe.calibration.known_tokens
    if not tokens:
        return None
    speeds = measure_speeds(run)
    compress, recipe = run.recipe.compress, run.recipe
    once = sum(2 * count for count in run.numbers.values())
    sums, alone = _sums(run)
    gradients = min(tokens, compress.fisher_tokens) * run.measured
    inputs = disk.inputs_alone(recipe, tokens) * run.measured
    drawn = 0.0 if run.device.device.type != "cpu" else DRAWING * gradients * run.vocabulary
    return {
        "files": _files(run),
        "evaluating": _predicted(run) / speeds.evaluating + _timing(run),
        "writing": _writing(run) / speeds.forward,
        "activations": BESIDES * once * (gradients + inputs) / speeds.forward + inputs * alone / speeds.single,
        "sensitivity": BESIDES * 2 * once * gradients / speeds.forward + gradients * sums / speeds.single + drawn,
        "decompositions": _decompositions(run) / speeds.decomposing,
        "distilling": BESIDES * _distilling(run, tokens) / speeds.learning,
        "fine-tuning": BESIDES * (_finetuning(run) / speeds.learning + _checks(run) / speeds.forward),
        "few bits": BESIDES * fewbits.operations(run) / speeds.learning,
    }


def _distilling(run: Counts, tokens: int) -> float:
    """Operations of layers that learn or whose inputs are measured: the teacher's, and the student's moving on."""
    epochs = run.recipe.distill.epochs
    seen = tokens if epochs else min(tokens, run.recipe.compress.gram_tokens) if run.grams else 0
    once = sum(2 * count for count in run.numbers.values())
    train = sum(6 * (run.rest[name] + run.factors[name]) for name in run.factors)
    return float(seen * (2 * once + train * len(run.streams) * epochs))


def _sums(run: Counts) -> tuple[float, float]:
    """Operations per token of the sums of squares, in float32: with gradients, and of inputs alone."""
    sums = 4 * factor_numbers(run.plan.layers)
    if run.foretold:
        sums += 2 * sum(kept_numbers(w) for layer in run.plan.layers for w in observable(layer))
    alone = sums // 2
    if run.narrows:
        sums += 2 * (larger_numbers(run.plan.layers) - smaller_numbers(run.plan.layers))
        alone += 2 * (larger_numbers(run.plan.layers, entries=False) - smaller_numbers(run.plan.layers, entries=False))
    return sums, alone


def _finetuning(run: Counts) -> float:
    """Operations of fine-tuning on text: 6 per parameter and token, and 2 where the original predicts as well."""
    section, plan = run.recipe.finetune, run.plan
    if section is None or run.source.config.is_encoder_decoder:
        return 0.0
    if section.steps:
        updates = section.steps * section.batch_size * section.gradient_accumulation * section.sequence_length
    else:
        updates = _learned(run, section) * section.epochs
    return float(updates) * (6 * plan.after + 2 * plan.before * section.taught)


def _checks(run: Counts) -> float:
    """Operations by which fine-tuning is judged on what was held out."""
    section, plan = run.recipe.finetune, run.plan
    if section is None or run.source.config.is_encoder_decoder:
        return 0.0
    held = section.checks * section.holdout * _learned(run, section)
    return 2 * held * (plan.after + plan.before * section.taught)


def _learned(run: Counts, section: Finetune) -> int:
    return section.tokens or run.recipe.calibration.known_tokens or 0


def _files(run: Counts) -> float:
    """Seconds for files of weights: a GGUF is unpacked, models are opened to be measured, results are written."""
    tuned = run.recipe.finetune is not None
    opened = run.plan.before + run.plan.after * (2 * _results(run.recipe) + tuned)
    return opened / OPENED + (run.source.parameters / UNPACKED if run.source.gguf else 0.0)


def _writing(run: Counts) -> float:
    """Operations by which the model writes its own text, a token of every text of a round at a time."""
    written = run.recipe.calibration.written + run.recipe.learned_written
    return 2.0 * WRITING * run.plan.before * written


def _decompositions(run: Counts) -> float:
    """What finding spectra and factors by the predictions' sensitivity takes, in numbers n^2 N of matrices."""
    if not run.measured:
        return 0.0
    weights = [weight for layer in run.planned for weight in observable(layer)]
    found = FACTORISING * sum(w.copies * min(w.shape) ** 2 * max(w.shape) for w in weights)
    if run.narrows:
        inside = [name for layer in run.plan.layers for mlp in layer.neurons for name in mlp.weights]
        shapes = [run.plan.weights[name].shape for name in inside]
        found += NARROWING * sum(min(shape) ** 2 * max(shape) for shape in shapes)
    return float(found)


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
