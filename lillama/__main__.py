"""`python -m lillama` is the command `lillama`, for where its script is not on the path."""

from __future__ import annotations

import sys

from lillama.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
