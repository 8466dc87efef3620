"""Errors a person can act on: what happened, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    """A hint that names the nearest known word (case aside), or lists them all."""
    known = sorted(known)
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{folded[near[0]]}'?"
    return f"Known: {', '.join(known)}." if known else "None are known."
