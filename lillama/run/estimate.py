"""What a run will need, estimated before it starts: memory, disk, time. (Parameter counts are exact, these are not.)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lillama.base.device import Device
from lillama.contract import Weight
from lillama.evaluate.in_turn import divided
from lillama.factorise.grams import choose_gram
from lillama.factorise.rounding import kept_numbers
from lillama.finetune.faster import is_fused_slow
from lillama.plan.plan import Plan, factor_numbers, larger_numbers, observable
from lillama.pretrained.predictions import LOGITS, READ
from lillama.pretrained.source import Source
from lillama.recipe.schema import Recipe
from lillama.run import disk, duration, fewbits
from lillama.run.counts import Counts
from lillama.run.prepare import Prepared

PROCESS_BYTES = 600_000_000  # Python, torch, transformers and datasets themselves, on a CPU
TRAINER_BYTES = 100_000_000  # what fine-tuning imports besides
NORMS = 2  # of a block
# Of a number of an embedding's table while its factors are found, in float64, and learn: as measured
# (benchmarks/memory.py) of 49 k x 576 and 262 k x 256 numbers, by the default recipe.
TABLE_BYTES = 60
OF_PAIRS = 12  # bytes that plain attention keeps for every pair of tokens of every head: chances, twice over, and more
LOGITS_HELD = 4  # times the logits made at once: they, their gradient, and what two products of that size take


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory on the working device, bytes of disk, and seconds (None: the number of tokens is unknown)."""

    memory: int
    disk: int
    seconds: float | None
    tokens: int | None


def check_disk(prepared: Prepared, estimated: Estimate | None = None) -> str | None:
    """A warning where the disk has little more room than the run needs; LillamaError where it has less."""
    if estimated is None:
        parts = (prepared.source, prepared.plan, prepared.recipe, prepared.device)
        wanted = disk.needed(Counts(*parts))
    else:
        wanted = estimated.disk
    return disk.check(wanted, Path(prepared.recipe.run.out))


def estimate(source: Source, plan: Plan, recipe: Recipe, device: Device) -> Estimate:
    """Estimate a run on this machine. The time rests on a matrix product measured now."""
    run = Counts(source, plan, recipe, device)
    if run.sequential:
        copies = 3 if "student" in run.streams else 2
        place, stream_bytes = disk.streams(run, copies, recipe.calibration.known_tokens or 0)
        own = place == ("host" if device.device.type == "cpu" else "device")
        memory = _one_by_one(run) + (stream_bytes if own else 0)
    else:
        memory = _all_at_once(run)
    memory = max(memory, _measuring_bytes(run), _table_bytes(run), _writing_bytes(run))
    memory = max(memory, _evaluation_bytes(run), _finetuning_bytes(run), _quantising_bytes(run))
    if device.device.type == "cpu":
        memory += PROCESS_BYTES
    return Estimate(int(memory), disk.needed(run), duration.seconds(run), recipe.calibration.known_tokens)


def _students(run: Counts) -> dict[str, int]:
    """Bytes of every student: its weights, two moments of what trains, and on a CPU the best state so far.

    The best state is on the host, and in files where memory is low.
    """
    best = 4 if run.device.device.type == "cpu" and not run.recipe.run.low_memory else 0
    return {n: 4 * (run.rest[n] + run.factors[n]) + (8 + best) * run.trained[n] for n in run.factors}


def _step(run: Counts) -> tuple[int, int]:
    """Bytes of a step's activations, and of one layer's gradient (there is one at a time)."""
    outputs = max((sum(_through(w, run.chosen) for w in layer.weights) for layer in run.layers), default=0)
    return run.batch * outputs * 4 * (2 if len(run.streams) == 1 else 3), 4 * max(run.trained.values(), default=0)


def _one_by_one(run: Counts) -> int:
    """Memory of the sequential schedule, streams left out."""
    teacher, students = run.source.working.itemsize, _students(run)
    layer = max((teacher * run.numbers[name] + students[name] for name in students), default=0)
    activations, gradient = _step(run)
    grams = _gram_bytes(run.plan.planned(run.planned[0]), run.grams) if run.planned else 0
    # Teacher weights are gathered from several tensors; a gradient is made when the Grams are gone.
    return layer + activations + max(gradient, 3 * grams)


def _all_at_once(run: Counts) -> int:
    """Memory of the concurrent schedule."""
    teachers = [run.source.working.itemsize * count for count in run.numbers.values()]
    held = max(teachers, default=0) if run.recipe.run.low_memory else sum(teachers)
    outside = run.source.outside(layer.name for layer in run.plan.layers)
    around = sum(run.source.model.get_parameter(name).numel() for name in outside)
    return held + sum(_students(run).values()) + sum(_step(run)) + run.source.working.itemsize * around


def _writing_bytes(run: Counts) -> int:
    """The whole original, the keys and values of a round's texts, and the predictions of their next tokens."""
    item, found = run.device.compute.itemsize, 0
    blocks = sum(1 for layer in run.plan.layers if layer.kind == "block")
    for section in (run.recipe.calibration.generate, run.recipe.learned_generate):
        if section is not None:
            kept = 2 * item * blocks * run.width * section.length  # as many heads of keys as of queries, at most
            held = item * run.plan.before + section.batch * (kept + 4 * LOGITS_HELD * run.vocabulary)
            found = max(found, held)
    return found


def _finetuning_bytes(run: Counts) -> int:
    """Weights, gradients and two moments of what learns, the original where it predicts, and what a batch takes."""
    source, section = run.source, run.recipe.finetune
    if section is None:
        return 0
    whole, trained = disk.learning(run, section)
    weights = (
        4 * whole
        + (12 if section.average is None else 16) * trained
        + (0 if section.anchor is None else 4 * (trained if section.lora is None else whole))
        + (run.plan.before * source.working.itemsize if section.taught else 0)
    )
    if run.device.device.type == "cpu":
        weights += TRAINER_BYTES
    if run.device.compute.itemsize < 4:
        weights += run.device.compute.itemsize * trained  # in the type of products, for as long as a step takes
    # What a plugin's own examples hold nobody knows.
    tokens = section.batch_size * (0 if source.config.is_encoder_decoder else section.sequence_length)
    logits = 4 * LOGITS_HELD * min(tokens * run.vocabulary, LOGITS)
    return weights + tokens * (_kept_for_gradients(run) + _kept_of_pairs(run, section.sequence_length)) + logits


def _kept_of_pairs(run: Counts, length: int) -> int:
    """Bytes per token that plain attention keeps of its pairs with others, in every block, where a model has that."""
    if not is_fused_slow(run.device, length):
        return 0
    heads = getattr(run.source.config.get_text_config(), "num_attention_heads", 0)
    return (
        OF_PAIRS
        * (heads if isinstance(heads, int) else max(heads))
        * length
        * sum(layer.kind == "block" for layer in run.plan.layers)
    )


def _quantising_bytes(run: Counts) -> int:
    """The model in float32, what a batch of calibration keeps, and the moments of the weights."""
    logits = run.device.compute.itemsize * LOGITS_HELD * run.vocabulary  # of all positions at once
    rounding, section = fewbits.memory(run, _kept_for_gradients(run), logits), run.recipe.quantize
    if section is None or not section.steps:
        return rounding
    # Codes and what is made of them, which the way back needs, beside the original that predicts.
    tokens = fewbits.learned_tokens(run.recipe)
    held = 8 * run.plan.after + run.plan.before * run.source.working.itemsize + TRAINER_BYTES
    logits = 4 * LOGITS_HELD * min(tokens * run.vocabulary, LOGITS)
    return max(rounding, held + tokens * _kept_for_gradients(run) + logits)


def _kept_for_gradients(run: Counts) -> int:
    """Bytes per token that a forward pass of the whole model keeps until its gradients are there.

    They are what goes into and comes out of every weight, and between factors; where weights share an input, what
    stands between them (attention, the activation) keeps as much again. Two norms of a block keep what they are given
    and what they make of it, in float32.
    """
    plan, item = run.plan, run.device.compute.itemsize
    kept = 0
    for layer in plan.layers:
        if layer.kind == "block" and layer.weights:
            kept += 4 * 2 * NORMS * run.width
            kept += item * sum(_through(w, run.chosen) + _rank(w, plan, run.chosen) for w in layer.weights)
    return kept


def _rank(weight: Weight, plan: Plan, chosen: int) -> int:
    """Numbers per token between the factors of a weight."""
    times = min(chosen, weight.copies) if weight.kind == "experts" else 1
    return plan.ranks.get(weight.name, 0) * times


def _measuring_bytes(run: Counts) -> int:
    """The predictions' sensitivity: what stands outside the blocks, all their streams, logits, or one block's step."""
    if not run.measured:
        return 0
    source, item = run.source, run.source.working.itemsize
    blocks = [layer for layer in run.plan.layers if layer.kind == "block"]
    outside = source.outside([layer.name for layer in blocks], True)
    around = item * sum(source.model.get_parameter(name).numel() for name in outside)
    logits = run.device.compute.itemsize * LOGITS_HELD * min(run.batch * run.vocabulary, LOGITS)
    block = max((item * run.numbers.get(layer.name, 0) for layer in blocks), default=0)
    squares = max((factor_numbers([layer]) for layer in blocks), default=0)
    if run.narrows:
        squares += max((larger_numbers([layer]) for layer in blocks), default=0)
    place, streams = disk.measured_streams(run, len(blocks))
    own = place == ("host" if run.device.device.type == "cpu" else "device")
    if run.foretold:
        squares += max((sum(kept_numbers(w) for w in observable(layer)) for layer in blocks), default=0)
    return (streams if own else 0) + max(around + logits, block + 8 * squares + _step(run)[0])


def _table_bytes(run: Counts) -> int:
    """The largest embedding that becomes low-rank, and the logits of a batch where its head does as well."""
    tables = [w.shape[0] * w.shape[1] for layer in run.planned for w in layer.weights if w.kind == "embedding"]
    heads = any(layer.kind == "head" for layer in run.planned)
    logits = LOGITS_HELD * 4 * run.batch * run.vocabulary if heads else 0
    return TABLE_BYTES * max(tables) + logits if tables else 0


def _evaluation_bytes(run: Counts) -> int:
    """The original and the logits of a batch, or all models at once where they are measured in turn."""
    source, recipe = run.source, run.recipe
    if not (recipe.evaluate or source.gguf):
        return 0
    results = 2 if recipe.finetune else 1
    together = source.dtype.itemsize * (run.plan.before + results * run.plan.after)
    if recipe.quantize:
        together += fewbits.checkpoint_bytes(recipe.quantize, run.plan, source.model, source.dtype.itemsize, most=True)
    if not divided(recipe)[1]:
        together = 0
    whole = sum(p.numel() for p in source.model.parameters()) * source.dtype.itemsize
    # Logits of the evaluators' usual four windows of 512 tokens, and what is computed from them, in float32.
    return max(together, whole * 5 // 4 + 4 * LOGITS_HELD * min(2048 * run.vocabulary, READ))


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
