"""What the files of a run look like, so that one that looks otherwise is named before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError


@dataclass(frozen=True)
class Each:
    """An object whose values all look the same."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """What may be null, or as a key be missing."""

    value: Any


Predicate = Callable[[Any], bool]


def number(value: Any) -> bool:
    """Whether it is a number that can be shown; what overflowed on the way is none."""
    return isinstance(value, int | float) and abs(value) < 1e300  # no NaN either


def anything(value: Any) -> bool:
    """Whether it is there."""
    return True


def text(value: Any) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def above_zero(value: Any) -> bool:
    """Whether it is such a number."""
    return number(value) and value > 0


def outcomes(value: Any) -> bool:
    """Whether it is a text of zeros and ones."""
    return isinstance(value, str) and set(value) <= {"0", "1"}


SPREAD = (number, number, number)
METRICS = Each(Maybe(number))
RESULT = {
    "parameters": Each(number),
    "bytes": {"before": above_zero, "after": number, "quantized": Maybe(number)},
    "before": METRICS,
    "after": METRICS,
    "finetuned": Maybe(METRICS),
    "quantized": Maybe(METRICS),
    "seconds": Each(number),
    "peak_memory_bytes": number,
}
WEIGHT = {"layer": text, "weight": text, "rank": Maybe(number), "parameters": number, "after": number}
PLAN = {"weights": [WEIGHT], "parameters": {"before": number, "after": number}, "reduction": number}
RECIPE = {"model": {"id": text}, "compress": Each(anything), "distill": Each(anything)}
STAGE = {"details": Maybe(Each(anything))}
HARNESS = {
    "lm_eval": anything,
    "batch_size": anything,
    "dtype": anything,
    "limit": Maybe(number),
    "tasks": Each({"metric": text, "hits": Maybe(outcomes)}),
}
WINDOWS = {"before": [text], "length": number}
SAMPLE = {"prompt": text, "completion": text}
IN_TURN = {"stages": Maybe(Each({"details": Each(anything)}))}
PHASE = Maybe({"original": Maybe(number), "compressed": Maybe(number), "ratio": Maybe(SPREAD)})
BENCH = {"rows": [{"length": anything, "prefill": PHASE, "decode": PHASE, "peak_memory_bytes": Maybe(Each(number))}]}
MANIFEST = {"fingerprint": Maybe(Each(anything))}
MODEL = {"architectures": Maybe([text])}


def check(value: Any, shape: Any, file: Path) -> None:
    """LillamaError that names the first place in `value`, read from `file`, which looks otherwise than `shape`."""
    for place in _misfits(value, shape, ()):
        raise LillamaError(
            f"this is not what a run writes{f' at {place}' if place else ''}",
            where=str(file),
            hint="The file is damaged, or of another version: remove it, or run the recipe again.",
        )


def check_details(details: dict[str, Any], file: Path) -> None:
    """The same for what evaluators told besides numbers, as far as it is known here."""
    for key, detail in details.items():
        if not isinstance(detail, dict):
            continue
        if key.partition("/")[0] == "harness":
            check(detail, HARNESS, file)
        if "completion" in detail:
            check(detail, SAMPLE, file)
        check(detail, {"windows": Maybe(WINDOWS)}, file)
        check(detail, {"ratio": Maybe(Each(SPREAD))}, file)


def _misfits(value: Any, shape: Any, place: tuple[str, ...]) -> Iterator[str]:
    if isinstance(shape, Maybe):
        if value is not None:
            yield from _misfits(value, shape.value, place)
    elif isinstance(shape, Each) and isinstance(value, dict):
        for key, inner in value.items():
            yield from _misfits(inner, shape.value, (*place, key))
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            yield from _misfits(value.get(key), inner, (*place, key))
    elif isinstance(shape, list) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _misfits(inner, shape[0], (*place, str(i)))
    elif isinstance(shape, tuple) and isinstance(value, list) and len(value) == len(shape):
        for i, (inner, wanted) in enumerate(zip(value, shape)):
            yield from _misfits(inner, wanted, (*place, str(i)))
    elif not (callable(shape) and shape(value)):
        yield ".".join(place)
