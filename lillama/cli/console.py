"""Where the command line writes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console; wide enough for a table where the output is a file or a pipe."""
    from rich.console import Console  # imported when first needed

    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)
