"""Where the command line writes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lillama.base import ranks

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console; wide enough for a table where the output is a file or a pipe."""
    from rich.console import Console  # imported when first needed

    quiet = not ranks.is_first()
    found = Console(stderr=stderr, quiet=quiet)
    return found if found.is_terminal else Console(stderr=stderr, width=120, quiet=quiet)
