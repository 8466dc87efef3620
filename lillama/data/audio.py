"""Speech from anywhere as clips: mono samples at the rate a model wants, with their transcripts.

Rows come from `lillama.data.rows` (a hub id, or a folder whose `manifest.jsonl` holds {"audio", "text"} per line) and
are decoded with soundfile and resampled with soxr, one at a time, so that hours of speech need no memory. Neither
torchaudio nor torchcodec is needed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.data.rows import load_rows
from lillama.errors import LillamaError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

AUDIO = ("audio", "file", "path")
TEXT = ("text", "transcription", "sentence", "transcript", "normalized_text", "raw_transcription")
SKIPPED_AT_MOST = 0.1  # of the clips
NAMED_AT_MOST = 5  # of the skipped ones, in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Clip:
    """One piece of speech: mono float32 `samples` at `rate` per second; `text` is None where nobody wrote it down."""

    name: str
    samples: NDArray[np.float32]
    rate: int
    text: str | None

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate

    @property
    def digest(self) -> str:
        """16 hex digits of the sha256 of the samples."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()[:16]


class Clips:
    """The clips of a data set, read while they are iterated over.

    Audio that cannot be read, is empty or silent is skipped; `skipped` then holds (name, reason). Raises
    LillamaError as soon as more than a tenth of all rows were skipped, and logs a warning about fewer at the end.
    """

    def __init__(self, rows: Dataset, base: Path | None, rate: int, where: str, text: str | None) -> None:
        """`rows` has the undecoded column `audio`; `base` is what relative paths are relative to."""
        self.rows, self.base, self.rate, self.where, self.text = rows, base, rate, where, text
        self.skipped: list[tuple[str, str]] = []
        self._warned = False

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Clip]:
        self.skipped = []
        for number, row in enumerate(self.rows):
            audio = row["audio"] or {}
            name = Path(audio.get("path") or f"row {number}").name
            try:
                samples = self._samples(audio)
            except _Unusable as reason:
                self._skip(name, str(reason))
                continue
            text = (row[self.text] or "").strip() if self.text else ""
            yield Clip(name, samples, self.rate, text or None)
        if self.skipped and not self._warned:
            log.warning("skipped %s", self._summary())
            self._warned = True

    def _samples(self, audio: dict[str, Any]) -> NDArray[np.float32]:
        if audio.get("bytes"):
            return decode(audio["bytes"], self.rate)
        if not audio.get("path"):
            raise _Unusable("no audio")
        path = Path(audio["path"])
        path = path if self.base is None else self.base / path
        try:
            return decode(path.read_bytes(), self.rate)
        except OSError as error:
            raise _Unusable("no such file" if isinstance(error, FileNotFoundError) else str(error)) from error

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append((name, reason))
        if len(self.skipped) > SKIPPED_AT_MOST * len(self.rows):
            raise LillamaError(
                f"too much of the audio cannot be used: {self._summary()}",
                where=f"{self.where}.dataset",
                hint=f"Mend or remove these; up to {SKIPPED_AT_MOST:.0%} of the clips are skipped.",
            )

    def _summary(self) -> str:
        named = [f"{name} ({reason})" for name, reason in self.skipped[:NAMED_AT_MOST]]
        rest = f" and {len(self.skipped) - len(named)} more" if len(self.skipped) > len(named) else ""
        return f"{len(self.skipped)} of {len(self.rows)} clips: {', '.join(named)}{rest}"


class _Unusable(Exception):  # noqa: N818  a reason, not an error: the clip is skipped
    pass


def read_clips(
    dataset: str,
    *,
    split: str,
    rate: int,
    where: str,
    config: str | None = None,
    column: str | None = None,
    fraction: float = 1.0,
    seed: int | None = None,
) -> Clips:
    """The clips of `split` of a data set: all in order, or with a `seed` shuffled and `fraction` of them.

    `dataset`, `config` and `split` are those of `lillama.data.rows.load_rows`; `column` is the transcript's
    (None: found by its usual names, or there is none). `where` is the recipe's section. Raises LillamaError for
    data that holds no audio, and where packages of the extra `speech` are missing.
    """
    import datasets

    require("soundfile", "soxr", where=f"{where}.dataset")
    rows = load_rows(dataset, config=config, split=split, where=where)
    names = rows.column_names
    audio = next((name for name in AUDIO if name in names), None)
    columns = f"The columns are: {', '.join(names)}."
    if audio is None:
        raise LillamaError(
            f"'{dataset}' has no column of audio",
            where=f"{where}.dataset",
            hint=f'{columns} A folder of audio needs manifest.jsonl with {{"audio": FILE, "text": TEXT}} per line.',
        )
    if column is not None and column not in names:
        raise LillamaError(f"there is no column '{column}'", where=f"{where}.column", hint=columns)
    text = column or next((name for name in TEXT if name in names), None)
    rows = rows.select_columns([audio, *([text] if text else [])])
    rows = rows if audio == "audio" else rows.rename_column(audio, "audio")
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    if seed is not None:
        import torch

        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = rows.select(order[: math.ceil(fraction * len(rows))])
    return Clips(rows, _base(dataset, config), rate, where, text)


def _base(dataset: str, config: str | None) -> Path | None:
    """The folder that paths in a local manifest are relative to."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path / config if config and (path / config).is_dir() else path
    return None


def decode(data: bytes, rate: int) -> NDArray[np.float32]:
    """The mono samples at `rate` of a WAV, FLAC, MP3 or OGG file's bytes, whatever its own rate and channels."""
    import numpy as np
    import soundfile
    import soxr

    if not data:
        raise _Unusable("empty")
    try:
        samples, own = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile has a dozen ways to refuse a file
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Unusable(f"unreadable: {text.rpartition('>: ')[2]}") from error
    mono = samples.mean(axis=1)
    if not len(mono):
        raise _Unusable("empty")
    if not np.isfinite(mono).all():
        raise _Unusable("samples are not finite")
    if not mono.any():
        raise _Unusable("silent")
    if own != rate:
        mono = soxr.resample(mono, own, rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def pieces(clip: Clip, seconds: float) -> list[Clip]:
    """The clip in pieces of at most `seconds`, cut where it is quietest in the last fifth of a piece.

    A clip that is short enough is returned as it is; pieces have no transcript.
    """
    import numpy as np

    most = int(seconds * clip.rate)
    if len(clip.samples) <= most:
        return [clip]
    found, rest = [], clip.samples
    window = max(min(clip.rate // 10, most // 5), 1)
    while len(rest) > most:
        start = most - max(most // 5, 1)
        loudness = np.convolve(np.square(rest[start:most]), np.ones(window, np.float32), "valid")
        cut = start + int(loudness.argmin()) + window // 2
        found.append(rest[:cut])
        rest = rest[cut:]
    found.append(rest)
    return [Clip(f"{clip.name}[{i}]", samples, clip.rate, None) for i, samples in enumerate(found)]


def require(*packages: str, where: str) -> None:
    """Raise LillamaError that names the extra `speech` unless all `packages` are installed."""
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise LillamaError(
                f"speech needs the package '{package}', which is not installed",
                where=where,
                hint="Install the extra: pip install 'lillama[speech]'",
            )
