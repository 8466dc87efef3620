"""Speed of a model: tokens per second, reading a prompt and writing after it, and the memory that takes."""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lillama.base.memory import remember_peaks
from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import positions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Timing:
    """One prompt read and continued: seconds of the prefill, seconds after the first token, bytes beside weights."""

    prefill: float
    decode: float
    memory: int | None = None


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
    and "decode_LENGTH_...", or its name to "out_of_memory" in `context.details`. The peak is measured on CUDA. Models
    are compared by `lillama bench`, which runs them in turn. Raises LillamaError if the model has too few positions.
    """
    most = positions(model)
    if most is not None and prompt_tokens + new_tokens + 1 > most:
        raise LillamaError(
            f"{prompt_tokens} + {new_tokens} + 1 tokens are more than the model's {most} positions",
            where=f"{context.where}.prompt_tokens",
            hint="Lower prompt_tokens or new_tokens.",
        )
    found: dict[str, float] = {}
    training = model.training
    model.eval()
    try:
        for length in [None, *lengths]:
            tokens = length or prompt_tokens
            if most is not None and tokens + new_tokens + 1 > most:
                continue
            prompt = prompts(model, batch_size, tokens, context.seed, context.device)
            try:
                timed(model, prompt, new_tokens)
                times = [timed(model, prompt, new_tokens) for _ in range(repeats)]
            except Exception as error:
                if length is None or not is_out_of_memory(error):
                    raise
                context.details.setdefault("out_of_memory", []).append(length)
                give_back()
                continue
            infix = f"_{length}" if length else ""
            found[f"prefill{infix}_tokens_per_second"] = batch_size * tokens / median(t.prefill for t in times)
            found[f"decode{infix}_tokens_per_second"] = batch_size * new_tokens / median(t.decode for t in times)
            if not length:
                found["weight_bytes"] = float(weight_bytes(model))
                if context.device.startswith("cuda") and times[0].memory is not None:
                    found["peak_memory_bytes"] = weight_bytes(model) + max(t.memory or 0 for t in times)
    finally:
        model.train(training)
    return found


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on any device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = re.search(r"not enough memory|can't allocate memory", str(error))
    return isinstance(error, RuntimeError) and said is not None


def give_back() -> None:
    """Free what an attempt that ran out of memory left behind."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
