"""Where things that can be made again are kept between runs: the user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def directory(name: str) -> Path:
    """The directory `name` of the cache, made if need be: in $LILLAMA_CACHE, $XDG_CACHE_HOME/lillama or ~/.cache."""
    if given := os.environ.get("LILLAMA_CACHE"):
        root = Path(given).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lillama"
    path = root / name
    path.mkdir(parents=True, exist_ok=True)
    return path
