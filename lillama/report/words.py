"""Numbers as people say them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def millions(count: int) -> str:
    """A parameter count in millions or billions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def number(value: float | None, endless: str = "infinite") -> str:
    """A number for people: four digits that count; `endless` stands for what is not finite."""
    if value is None:
        return ""
    if not math.isfinite(value) or abs(value) > 1e300:
        return endless
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def spread(ratio: Sequence[float]) -> str:
    """A ratio's median with what it ranged over, from [median, smallest, largest]."""
    return f"x {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def main_metrics(names: Sequence[str] | Mapping[str, float]) -> list[str]:
    """The metrics most people ask for first."""
    wanted = ("perplexity", "wer", "average", "acc_norm", "acc", "decode_tokens_per_second")
    return [name for end in wanted for name in names if name.rpartition("/")[2] == end]


def metric_name(name: str) -> str:
    """A metric as people call it: perplexity/perplexity is perplexity."""
    task, _, metric = name.rpartition("/")
    metric = metric.replace("_tokens_per_second", " tokens/s").replace("_", " ")
    return metric if task in ("", metric, "speed") else f"{task} {metric}"
