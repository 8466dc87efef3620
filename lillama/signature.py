"""What a registered function asks for: its parameters, and whether something is given for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lillama.errors import LillamaError, did_you_mean

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """How the engine calls a function: the first arguments by position, others by name where the function names them.

    `options`: further keyword-only parameters are the recipe's.
    """

    positional: int
    named: frozenset[str] = frozenset()
    options: bool = False

    def check(self, what: str, function: Callable[..., Any], where: str | None = None) -> None:
        """LillamaError for a parameter that nothing would be given for, with a default too: it may be misspelt."""
        asked = parameters(function)
        first = [p for p in asked if p.kind is not p.KEYWORD_ONLY][: self.positional]
        if len(first) < self.positional and not _takes_any(function):
            raise LillamaError(
                f"{what} ({origin(function)}) takes {len(first)} arguments by position, and is given {self.positional}",
                where=where,
                hint="docs/plugins.md has the signatures.",
            )
        for parameter in asked:
            if parameter in first or (self.options and parameter.kind is parameter.KEYWORD_ONLY):
                continue
            if parameter.name not in self.named or parameter.kind is parameter.POSITIONAL_ONLY:
                raise LillamaError(
                    f"{what} ({origin(function)}) has a parameter '{parameter.name}', which nothing is given for",
                    where=where,
                    hint=did_you_mean(parameter.name, self.named) if self.named else "It is given no others.",
                )


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or class, *args and **kwargs left out; none where it has no signature to show."""
    return [p for p in _signature(function).parameters.values() if p.kind not in _VARIABLE]


def origin(target: Any) -> str:
    """`file:line` of a function or class, or its name where it has no source."""
    inner = inspect.unwrap(target)
    try:
        return f"{inspect.getsourcefile(inner)}:{inspect.getsourcelines(inner)[1] or 1}"
    except (TypeError, OSError):
        return repr(target)


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in _signature(function).parameters.values())


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function may have none
        return inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])
