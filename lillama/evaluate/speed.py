"""Speed of a model: tokens per second, reading a prompt and writing after it."""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

from pydantic import Field

from lillama.errors import LillamaError
from lillama.evaluate import Context


def speed(
    model: Any,
    context: Context,
    *,
    batch_size: Annotated[int, Field(ge=1, description="Sequences at once.")] = 1,
    prompt_tokens: Annotated[int, Field(ge=1, description="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, Field(ge=1, description="Tokens written after the first one.")] = 32,
    repeats: Annotated[int, Field(ge=1, description="How often to measure; the median counts.")] = 3,
) -> dict[str, float]:
    """{"prefill_tokens_per_second", "decode_tokens_per_second"}, tokens of the whole batch, after a warm-up.

    Random tokens are continued greedily by `model.generate`, past any end of sequence. The time to the first
    new token is the prefill's; that from the first to the last one is the decoding's. Works for every model
    that generates, whatever its cache. Raises LillamaError if the model has too few positions.
    """
    import torch

    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens + 1 > positions:
        raise LillamaError(
            f"{prompt_tokens} + {new_tokens} + 1 tokens are more than the model's {positions} positions",
            where=f"{context.where}.prompt_tokens",
            hint="Lower prompt_tokens or new_tokens.",
        )
    generator = torch.Generator().manual_seed(context.seed)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(config.vocab_size, shape, generator=generator).to(context.device)
    training = model.training
    model.eval()
    try:
        _timed(model, prompt, new_tokens)
        times = [_timed(model, prompt, new_tokens) for _ in range(repeats)]
    finally:
        model.train(training)
    prefill, decode = (statistics.median(seconds) for seconds in zip(*times))
    return {
        "prefill_tokens_per_second": batch_size * prompt_tokens / prefill,
        "decode_tokens_per_second": batch_size * new_tokens / decode,
    }


def _timed(model: Any, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of `new_tokens` steps after it."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging

    def now() -> float:
        if prompt.device.type != "cpu":
            getattr(torch, prompt.device.type).synchronize()
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
    return clock.times[0] - start, clock.times[-1] - clock.times[0]
