"""What is said of recipes that are wrong: the word that was meant, and never a traceback."""

from __future__ import annotations

import pytest
import typos

from lillama.errors import did_you_mean, distance


def test_a_typo_of_one_edit_is_told_the_right_word():
    found = typos.measure(every=31)
    assert sum(found.all.values()) > 2000
    assert found.share >= 0.995, found.missed
    assert found.share_of_words >= 0.995, found.missed


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "ab", 2), ("of", "on", 1), ("ab", "ba", 1), ("decodr", "decoder", 1), ("kitten", "sitting", 3)],
)
def test_the_distance_of_two_words(a, b, edits):
    assert distance(a, b) == distance(b, a) == edits


def test_equally_near_words_are_all_named_and_far_ones_listed():
    assert did_you_mean("ion", ["of", "on", "in"]) == "Did you mean 'in' or 'on'?"
    assert did_you_mean("x", ["on", "of"]) == "Known: of, on."
    assert did_you_mean("x", ["y"]) == "Known: y."
    assert did_you_mean("z" * 10**6, ["storage"]) == "Known: storage."
