"""What makes an update faster and changes nothing that is learned, but for rounding (docs/results/speed.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from lillama.base.device import Device, of_processor

FUSED, PLAIN = "sdpa", "eager"
# Tokens of the longest sequence for which fused attention in bfloat16 takes longer, forwards and back, than plain one,
# which keeps a number for every pair of them: on processors of AMD, where it goes through small products of MKL's, and
# on those with AMX, where the way back of short sequences is slow.
OF_AMD, OF_AMX = 512, 256


def is_fused_slow(device: Device, length: int) -> bool:
    """Whether fused attention to sequences of `length` takes longer there than plain one, forwards and back."""
    if device.device.type != "cpu" or device.compute != torch.bfloat16:
        return False
    return length <= (OF_AMD if _is_amd() else OF_AMX if _has_amx() else 0)


@contextmanager
def quick_attention(learner: Any, teacher: Any, device: Device, length: int) -> Iterator[None]:
    """Let `learner` attend by plain products while it learns from sequences of `length`, where fused ones are slow.

    `teacher`, or None, does too where the way forwards is slow by itself: on processors of AMD. Encoders read more than
    what is learned.
    """
    attending = [learner, teacher] if teacher is not None and _is_amd() else [learner]
    changed = [one for one in attending if is_fused_slow(device, length) and _attends_fused(one)]
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


@cache
def _has_amx() -> bool:
    return "amx_bf16" in of_processor("flags").split()
