"""What makes an update faster and changes nothing that is learned, but for rounding (docs/results/speed.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from lillama.base.device import Device, of_processor

FUSED, PLAIN = "sdpa", "eager"
MOST = 512  # tokens of a sequence: plain attention keeps a number for every pair of them


def is_fused_slow(device: Device, length: int) -> bool:
    """Whether fused attention to sequences of `length` takes longer there than plain one, forwards and back."""
    return device.device.type == "cpu" and device.compute == torch.bfloat16 and length <= MOST and _is_amd()


@contextmanager
def quick_attention(models: Sequence[Any], device: Device, length: int) -> Iterator[None]:
    """Let `models` attend by plain products while they learn from sequences of `length`, where fused ones are slow.

    That is so in bfloat16 on processors of AMD: there torch's fused attention goes through small products of MKL's, and
    takes four times as long, forwards and back, as plain products by oneDNN. Encoders read more than what is learned.
    """
    changed = [one for one in models if is_fused_slow(device, length) and _attends_fused(one)]
    for model in changed:
        model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        for model in changed:
            model.set_attn_implementation(FUSED)


def _attends_fused(model: Any) -> bool:
    """Whether a model has fused attention, may have another, and reads no more than it learns from."""
    config = model.config
    may = getattr(model, "_can_set_attn_implementation", lambda: False)
    return config._attn_implementation == FUSED and not config.is_encoder_decoder and bool(may())


@cache
def _is_amd() -> bool:
    return of_processor("vendor_id") == "AuthenticAMD"
