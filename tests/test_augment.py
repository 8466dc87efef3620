"""Altered copies of speech: definite, of bounded length, never silent or with a transcript that is not theirs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.data.audio import Clip
from lillama.data.augment import altered


def clip(seconds, rate=8000, seed=0):
    time = np.arange(int(seconds * rate)) / rate
    sound = np.sin(2 * np.pi * (200 + 50 * seed) * time) * (0.2 + 0.2 * np.sin(2 * np.pi * 3 * time))
    return Clip("a.wav", sound.astype(np.float32), rate, "words")


@settings(max_examples=15)
@given(seconds=st.floats(0.2, 4.0), longest=st.floats(0.5, 3.0))
def test_copies_are_speech_of_bounded_length_without_a_transcript(seconds, longest):
    original = clip(seconds)
    copies = list(altered(original, 4, longest))
    assert len(copies) == 4
    for copy in copies:
        assert copy.text is None and copy.rate == original.rate and copy.samples.dtype == np.float32
        assert 0 < copy.seconds <= longest + 1e-9
        assert np.isfinite(copy.samples).all() and copy.samples.any()
    assert len({copy.digest for copy in copies} | {original.digest}) == 5


def test_copies_are_the_same_every_time_whatever_is_asked_for_beside_them():
    few, more = (list(altered(clip(2.0), count, 30.0)) for count in (2, 5))
    assert [copy.digest for copy in few] == [copy.digest for copy in more[:2]]
    assert few[0].digest != next(altered(clip(2.0, seed=1), 1, 30.0)).digest
