"""Speed of a model: tokens per second, reading a prompt and writing after it, and the memory that takes."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lillama.base.memory import remember_peaks
from lillama.errors import LillamaError
from lillama.evaluate.context import Context, measured_in_turn
from lillama.evaluate.perplexity import positions
from lillama.evaluate.turns import Turns, alternating, give_back, is_out_of_memory, ratio

if TYPE_CHECKING:
    import torch

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Timing:
    """One prompt read and continued: seconds of the prefill, seconds after the first token, bytes beside weights."""

    prefill: float
    decode: float
    memory: int | None = None


@dataclass(frozen=True)
class Settings:
    """The evaluator's options."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    lengths: Sequence[int]

    def lengths_up_to(self, most: int | None) -> list[tuple[str, int]]:
        """(what stands for it in the names of metrics, tokens of the prompt), those that fit into `most` positions."""
        room = math.inf if most is None else most - self.new_tokens - 1
        return [("", self.prompt_tokens), *((f"_{length}", length) for length in self.lengths if length <= room)]


def speed_in_turn(turns: Turns, contexts: Sequence[Context], **options: Any) -> list[dict[str, float]]:
    """The metrics of `speed` for several models, the first of them the original, timed in turn on the same prompts.

    The details of the others get "ratio": {metric: [median, smallest, largest]} of how many times as fast they are,
    over neighbouring measurements.
    """
    settings = Settings(**options)
    most = min((m for m in map(positions, turns.models) if m is not None), default=None)
    if most is not None and settings.prompt_tokens + settings.new_tokens + 1 > most:
        raise LillamaError(
            f"{settings.prompt_tokens} + {settings.new_tokens} + 1 tokens are more than the model's {most} positions",
            where=f"{contexts[0].where}.prompt_tokens",
            hint="Lower prompt_tokens or new_tokens.",
        )
    found: list[dict[str, float]] = [{} for _ in turns.models]
    with contextlib.ExitStack() as stack:
        for model in turns.models:
            stack.callback(model.train, model.training)
            model.eval()
        for infix, length in settings.lengths_up_to(most):
            prompt = prompts(turns.models[0], settings.batch_size, length, contexts[0].seed, turns.device)
            rounds = _rounds(turns, prompt, settings, spare=bool(infix))
            for number, (times, context) in enumerate(zip(rounds, contexts)):
                if not times:
                    context.details.setdefault("out_of_memory", []).append(length)
                    continue
                found[number] |= _rates(times, length, infix, settings)
                if not infix:
                    found[number] |= _bytes(turns.models[number], times, turns.device)
                if number and rounds[0]:
                    context.details.setdefault("ratio", {}).update(_ratios(rounds[0], times, infix))
    return found


def _rounds(turns: Turns, prompt: torch.Tensor, settings: Settings, spare: bool) -> list[list[Timing]]:
    """The timings of every model, which take turns; none of one that runs out of memory, where `spare`."""
    times: list[list[Timing]] = [[] for _ in turns.models]
    failed: set[int] = set()
    for number, order in alternating(len(times), settings.repeats + 1):
        for which in order:
            if which in failed:
                continue
            try:
                timing = turns.run(which, lambda model: timed(model, prompt, settings.new_tokens))
            except Exception as error:
                if not spare or not is_out_of_memory(error):
                    raise
                failed.add(which)
                times[which].clear()
                give_back()
                continue
            if number:  # the first one warms up
                times[which].append(timing)
    return times


def _rates(times: Sequence[Timing], length: int, infix: str, settings: Settings) -> dict[str, float]:
    """Tokens per second of a whole batch, the median over its timings."""
    tokens = {"prefill": length, "decode": settings.new_tokens}
    return {
        f"{phase}{infix}_tokens_per_second": settings.batch_size * tokens[phase] / median(_seconds(times, phase))
        for phase in PHASES
    }


def _ratios(original: Sequence[Timing], times: Sequence[Timing], infix: str) -> dict[str, list[float]]:
    return {
        f"{phase}{infix}_tokens_per_second": ratio(_seconds(original, phase), _seconds(times, phase))
        for phase in PHASES
    }


def _seconds(times: Sequence[Timing], phase: str) -> list[float]:
    return [getattr(timing, phase) for timing in times]


def _bytes(model: Any, times: Sequence[Timing], device: torch.device) -> dict[str, float]:
    """Those of the weights, and on CUDA the most in use with them."""
    weights = weight_bytes(model)
    if device.type != "cuda" or times[0].memory is None:
        return {"weight_bytes": float(weights)}
    return {"weight_bytes": float(weights), "peak_memory_bytes": weights + max(t.memory or 0 for t in times)}


@measured_in_turn(speed_in_turn)
def speed(
    model: Any,
    context: Context,
    *,
    batch_size: Annotated[int, Field(ge=1, description="Sequences at once.")] = 1,
    prompt_tokens: Annotated[int, Field(ge=1, description="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, Field(ge=1, description="Tokens written after the first one.")] = 32,
    repeats: Annotated[int, Field(ge=1, description="How often to measure; the median counts.")] = 3,
    lengths: Annotated[
        list[int], Field(description="Further lengths of prompt, those beyond the model's positions left out.")
    ] = [],  # noqa: B006  # never changed
) -> dict[str, float]:
    """{"prefill_tokens_per_second", "decode_tokens_per_second", "weight_bytes", "peak_memory_bytes"}.

    Tokens are those of the whole batch, after a warm-up. Random tokens are continued greedily by `model.generate`, past
    any end of sequence. The time to the first new token is the prefill's; that from the first to the last one is the
    decoding's. Works for every model that generates, whatever its cache. Each of `lengths` adds "prefill_LENGTH_..."
    and "decode_LENGTH_...", or its name to "out_of_memory" in `context.details`. The peak is measured on CUDA. In a run
    the original and what became of it are timed in turn, as `lillama bench` does. Raises LillamaError if the model has
    too few positions.
    """
    import torch

    options = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    turns = Turns([model], torch.device(context.device))
    return speed_in_turn(turns, [context], **options, lengths=lengths)[0]


def median(values: Any) -> float:
    """The median of any number of values."""
    return statistics.median(list(values))


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers of a model in memory; what is shared counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    import torch

    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def prompts(model: Any, batch_size: int, length: int, seed: int, device: Any) -> torch.Tensor:
    """Random token ids [batch_size, length]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch_size, length), generator=generator).to(device)


class _Memory:
    """The most memory in use since this was made, less what was in use then: of the device, or of this process."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device, self.base = device, 0
        self.known = True
        remember_peaks()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device)
        else:
            try:  # Linux forgets the peak of a process that asks for it so
                Path("/proc/self/clear_refs").write_text("5")
                self.base = self._kibibytes("VmRSS") * 1024
            except (OSError, ValueError):
                self.known = False

    @staticmethod
    def _kibibytes(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{name}:\s*(\d+) kB", text)
        if found is None:
            raise ValueError(name)
        return int(found[1])

    def peak(self) -> int | None:
        """Bytes beyond those at the start; None where nothing tells."""
        import torch

        if not self.known or self.device.type not in ("cuda", "cpu"):
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        with contextlib.suppress(OSError, ValueError):
            return max(self._kibibytes("VmHWM") * 1024 - self.base, 0)
        return None


def timed(model: Any, prompt: torch.Tensor, new_tokens: int) -> Timing:
    """Read `prompt` [B, T] and write `new_tokens` greedily after the first one."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging

    def now() -> float:
        synchronise(prompt.device)
        return time.perf_counter()

    class Clock(StoppingCriteria):
        """Asked after every token whether to stop: never does, and notes the time."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.times.append(now())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    clock = Clock()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # sampling settings of the checkpoint do not apply, and need no warning
    memory = _Memory(prompt.device)
    try:
        with torch.inference_mode():
            start = now()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                num_beams=1,
                min_new_tokens=new_tokens + 1,
                max_new_tokens=new_tokens + 1,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
    finally:
        logging.set_verbosity(level)
    return Timing(clock.times[0] - start, clock.times[-1] - clock.times[0], memory.peak())
