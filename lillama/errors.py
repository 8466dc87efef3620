"""Errors a person can act on: what happened, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 100  # letters of a word that are compared with others


class LillamaError(Exception):
    """A mistake the user can mend, shown without a traceback (exit status 2).

    `what` says what happened, `where` names the place (file:line and key), `hint` says what to do.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.hint}" if self.hint else text


class DistillationError(LillamaError):
    """Training went wrong in a way that must not be stored, such as a loss that is not finite."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known words (case aside), or lists them all."""
    known = sorted(known)
    near = nearest(word, known)
    if near:
        return f"Did you mean {quoted(near)}?"
    return f"Known: {', '.join(known)}." if known else "None are known."


def quoted(names: Iterable[str]) -> str:
    """Names as a hint has them: 'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """What `word` was probably meant to be: the known words one edit away, else the most alike one, if any is."""
    wanted = word[:LONGEST].casefold()
    folded = {name.casefold(): name for name in known}
    edits = {name: distance(wanted, name) for name in folded if abs(len(name) - len(wanted)) <= 1}
    # A word of one letter is one edit from every other: that says nothing.
    close = [name for name, edit in edits.items() if edit <= 1 and edit < max(len(name), len(wanted))]
    if close:
        least = min(edits[name] for name in close)
        return [folded[name] for name in close if edits[name] == least][:3]
    return [folded[name] for name in difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)]


def distance(a: str, b: str) -> int:
    """How many letters to insert, delete, replace or swap with their neighbour make `b` of `a` (optimal alignment)."""
    before: list[int] = []  # the row before `row`, and `last` the one before that
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                edits = min(edits, last[j - 2] + 1)
            row.append(edits)
    return row[-1]
