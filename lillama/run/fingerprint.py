"""What must be the same for stored results to be of use: all that decides a run's numbers."""

from __future__ import annotations

# Settings of a run that change nothing in its result.
NOT_IN_THE_NUMBERS = {
    "out",
    "low_memory",
    "snapshot_seconds",
    "stream_memory",
    "stream_device_memory",
    "curve",
    "curve_tokens",
    "track",
}
