"""Two models timed in turn on the same prompts: `lillama bench`.

The machine changes its pace under us (heat, neighbours), so the models alternate, and a ratio is that of two
measurements next to each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama import host
from lillama.base.rundir import ORIGINAL, RESOLVED, last_checkpoint
from lillama.errors import LillamaError
from lillama.evaluate import speed, strangers
from lillama.evaluate.perplexity import positions
from lillama.evaluate.speed import Timing, median
from lillama.evaluate.turns import Turns, alternating, give_back, is_out_of_memory, ratio
from lillama.lowrank.swap import count_parameters
from lillama.pretrained import sharing
from lillama.pretrained.locate import resolve
from lillama.recipe.schema import Recipe

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
NAMES = ("original", "compressed")
FILE = "bench.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured; a length of prompt that would take more than `seconds` is left out."""

    batch_size: int = 4
    lengths: Sequence[int] = LENGTHS
    new_tokens: int = 32
    repeats: int = 3
    seconds: float = 300.0
    seed: int = 0


@dataclass(frozen=True)
class Models:
    """The two places that are compared, and of a run its directory and recipe."""

    original: str
    compressed: str
    run: Path | None = None
    recipe: Recipe | None = None
    trust: bool = False


def models_of(given: Sequence[str], trust: bool = False) -> Models:
    """What to compare: the original and the last checkpoint of a run directory, or two models.

    `trust` allows code that came with them to run, whatever the run's own recipe says.
    """
    if len(given) == 2:
        return Models(given[0], given[1], trust=trust)
    run = Path(given[0])
    last = last_checkpoint(run) if len(given) == 1 else None
    if last is None or not (run / RESOLVED).is_file():
        raise LillamaError(
            f"'{given[0]}' is not a finished run", where="bench", hint="Give a run directory, or ORIGINAL COMPRESSED."
        )
    recipe = Recipe.load(run / RESOLVED, [f"model.trust_remote_code={json.dumps(trust)}"])
    strangers.check_model(recipe, run / RESOLVED)
    unpacked = run / ORIGINAL  # from a GGUF file
    original = str(unpacked) if unpacked.is_dir() else resolve(recipe.model)[0]
    return Models(original, str(last), run, recipe, trust)


def compare(models: Models, settings: Settings, device: str, dtype: str, say: Say) -> dict[str, Any]:
    """Load both models and time them; the result is what bench.json holds.

    "rows" has one entry a length: {"length", "prefill", "decode", "peak_memory_bytes"}, or "note" for what could not be
    measured. Speeds are tokens per second of the whole batch, medians; "ratio" is [median, smallest, largest] of
    compressed to original over neighbouring measurements.
    """
    import torch

    from lillama.base.device import choose, machine, name

    chosen = choose(device)
    chosen.activate()
    places = (models.original, models.compressed)
    loaded = [_opened(place, dtype, models) for place in places]
    pair = _Pair(loaded, chosen.device)
    return {
        "device": str(chosen.device),
        "machine": name(chosen.device) if chosen.device.type == "cuda" else machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "batch_size": settings.batch_size,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "models": {
            name: {
                "place": str(place),
                "parameters": count_parameters(model),
                "weight_bytes": speed.weight_bytes(model),
            }
            for name, place, model in zip(NAMES, places, loaded)
        },
        "in_turn": "both in memory" if pair.turns.together else "moved to the device in turn",
        "rows": list(rows(pair, settings, say)),
    }


def _opened(place: str, dtype: str, models: Models) -> Any:
    from lillama.checkpoint.open import find_plugin, open_model

    recipe, trust = models.recipe, models.trust
    plugin, auto = find_plugin(place, recipe, trust=trust)
    model = open_model(place, dtype, auto, trust)
    if plugin is not None:
        if getattr(model, "hf_quantizer", None) is None:
            sharing.share(model, host.get().shared_modules(plugin, model, recipe))
        host.get().prepare(plugin, model, recipe)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder:
        raise LillamaError(f"{type(model).__name__} does not continue a text", where="bench")
    return model


class _Pair:
    """Both models on the device, or by turns where they do not fit together."""

    def __init__(self, models: Sequence[Any], device: Any) -> None:
        self.models, self.device = models, device
        self.turns = Turns(models, device)

    def timed(self, which: int, prompt: Any, new_tokens: int) -> Timing:
        """One measurement of one model."""
        return speed.timed(self.turns.use(which), prompt, new_tokens)


def rows(pair: Any, settings: Settings, say: Say) -> Iterable[dict[str, Any]]:
    """A row a length; once a length is over the time limit, the longer ones are not tried."""
    most = min((m for m in map(positions, pair.models) if m is not None), default=None)
    per_token = 0.0
    for length in sorted(settings.lengths):
        needed = length + settings.new_tokens + 1
        estimate = per_token * length * 2 * (settings.repeats + 1)
        if most is not None and needed > most:
            yield {"length": length, "note": f"more than the {most:,} positions of the model"}
        elif estimate > settings.seconds:
            yield {"length": length, "note": f"not tried: it would take about {estimate:,.0f} s"}
        else:
            say(f"prompts of {length} tokens")
            row, per_token = _row(pair, length, settings)
            yield row


def _row(pair: Any, length: int, settings: Settings) -> tuple[dict[str, Any], float]:
    """The row of a length, and seconds per token of prompt for the next one."""
    prompt = speed.prompts(pair.models[0], settings.batch_size, length, settings.seed, pair.device)
    times: list[list[Timing]] = [[], []]
    failed: dict[str, str] = {}
    for repeat, order in alternating(2, settings.repeats + 1):
        for which in order:
            if NAMES[which] in failed:
                continue
            try:
                timing = pair.timed(which, prompt, settings.new_tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[NAMES[which]] = "out of memory"
                give_back()
                continue
            if repeat:  # the first one warms up
                times[which].append(timing)
    row: dict[str, Any] = {"length": length}
    tokens = {"prefill": settings.batch_size * length, "decode": settings.batch_size * settings.new_tokens}
    for phase, count in tokens.items():
        found = [[getattr(timing, phase) for timing in own] for own in times]
        speeds = {name: count / median(own) for name, own in zip(NAMES, found) if own}
        row[phase] = speeds | ({"ratio": ratio(*found)} if len(speeds) == 2 else {})
    memory = {
        name: speed.weight_bytes(model) + max(t.memory or 0 for t in own)
        for name, model, own in zip(NAMES, pair.models, times)
        if own and own[0].memory is not None
    }
    row |= {"peak_memory_bytes": memory} if memory else {}
    row |= {"note": ", ".join(f"{name}: {what}" for name, what in failed.items())} if failed else {}
    slowest = max((median(t.prefill + t.decode for t in own) for own in times if own), default=0.0)
    return row, slowest / length
