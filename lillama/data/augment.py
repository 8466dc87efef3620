"""Altered copies of speech, for when there is little of it: the original model says what is to be heard in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lillama.data.audio import Clip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPEEDS = (0.85, 1.2)
GAINS = (-12.0, 3.0)  # dB
NOISE = (15.0, 40.0)  # dB below the speech
SHORTEST_PART = 0.3  # of a clip


def altered(clip: Clip, copies: int, seconds: float) -> Iterator[Clip]:
    """`copies` altered versions of a clip, of at most `seconds`, none with a transcript.

    Each is a part of the clip, or its two parts in the other order, at another speed (and pitch) and loudness, with
    some noise. What comes out depends on the samples and the number of the copy alone: a stopped run repeats it.
    """
    import numpy as np

    for number in range(copies):
        digest = hashlib.sha256(f"{clip.digest}/{number}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        samples = _rearranged(clip.samples, random)
        samples = _at_speed(samples, clip.rate, random.uniform(*SPEEDS))[: int(seconds * clip.rate)]
        samples = _noisy(samples, random) * 10 ** (random.uniform(*GAINS) / 20)
        yield replace(clip, samples=np.ascontiguousarray(samples, dtype=np.float32), text=None)


def _rearranged(samples: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """A part of the clip, or its two parts in the other order, cut where it is quiet."""
    import numpy as np

    if random.random() < 0.5:
        cut = _quiet(samples, random.uniform(0.25, 0.75))
        return np.concatenate([samples[cut:], samples[:cut]])
    share = random.uniform(SHORTEST_PART, 1.0)
    start = random.uniform(0, 1 - share)
    return samples[_quiet(samples, start) : _quiet(samples, start + share)]


def _quiet(samples: NDArray[np.float32], place: float) -> int:
    """The quietest hundredth of a clip within a twentieth of its length around `place`, a share of it; ends stay."""
    import numpy as np

    n = len(samples)
    if place <= 0 or place >= 1 or n < 400:
        return round(min(max(place, 0.0), 1.0) * n)
    window = max(n // 100, 1)
    first, last = max(int((place - 0.05) * n), 0), min(int((place + 0.05) * n), n - window)
    starts = np.arange(first, max(last, first + 1), window)
    loudness = [float(np.square(samples[start : start + window]).mean()) for start in starts]
    return int(starts[int(np.argmin(loudness))]) + window // 2


def _at_speed(samples: NDArray[np.float32], rate: int, speed: float) -> NDArray[np.float32]:
    import soxr

    return soxr.resample(samples, rate * speed, rate)


def _noisy(samples: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """With white noise, so many decibels below the speech."""
    import numpy as np

    loudness = float(np.sqrt(np.square(samples, dtype=np.float64).mean())) if len(samples) else 0.0
    level = loudness * 10 ** (-random.uniform(*NOISE) / 20)
    return samples + random.normal(0.0, 1.0, len(samples)).astype(np.float32) * np.float32(level)
