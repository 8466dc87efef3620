"""Word error rate of a speech recogniser, and how fast it writes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lillama.base.memory import remember_peaks
from lillama.data.audio import Clip, pieces, read_clips, require
from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.speed import synchronise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORST = 10
RESAMPLES = 1000
ENGLISH = ("en", "english")


@dataclass(frozen=True)
class Transcribed:
    """A clip's reference and hypothesis, normalised, and the errors between them."""

    clip: str
    reference: str
    hypothesis: str
    words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def wer(
    model: Any,
    context: Context,
    *,
    dataset: Annotated[str, Field(description="Hub id, or a folder of audio with manifest.jsonl.")],
    config: Annotated[str | None, Field(description="Configuration of a hub data set.")] = None,
    split: Annotated[str, Field(description="Split, slices allowed: test[:10%].")] = "test",
    column: Annotated[
        str | None, Field(description="Column of the transcript; null: found by its usual names.")
    ] = None,
    language: Annotated[
        str | None, Field(description="What is spoken, for a multilingual model; null: the model tells, English rules.")
    ] = None,
    batch_size: Annotated[int | None, Field(ge=1, description="Clips at once; null: 8, on a GPU 32.")] = None,
    new_tokens: Annotated[int, Field(ge=1, description="Tokens to write for a clip at most.")] = 224,
    speed_tokens: Annotated[
        int | None, Field(ge=0, description="Tokens to write when timing; null: 64, on a GPU 400; 0: no timing.")
    ] = None,
    speed_batch: Annotated[
        int | None, Field(ge=1, description="Clips at once when timing; null: 4, on a GPU 128.")
    ] = None,
) -> dict[str, float]:
    """{"wer", "wer_low", "wer_high", "words", "substitutions", "deletions", "insertions", "tokens_per_second", ...}.

    Greedy transcripts against the data's own, both normalised by the processor's tokenizer (its English rules for
    English or where no language is given, else its basic ones); `wer` is errors per word of the reference,
    `wer_low` and `wer_high` its 95 % interval over resampled clips. `tokens_per_second` is of decoding
    after the first token; on CUDA "peak_memory_bytes" is that of the timing. The ten worst clips go to
    `context.details`. Clips longer than the model hears at once are cut where they are quietest. Raises
    LillamaError for data without transcripts, audio that cannot be read, or a model without a processor of audio.
    """
    require("jiwer", where=context.where)
    extractor = getattr(context.tokenizer, "feature_extractor", None)
    if extractor is None or not hasattr(model, "generate"):
        raise LillamaError("the model is no speech recogniser with a processor", where=context.where)
    gpu = context.device.startswith("cuda")
    clips = read_clips(
        dataset, config=config, split=split, column=column, rate=extractor.sampling_rate, where=context.where
    )
    if clips.text is None:
        raise LillamaError(
            f"'{dataset}' has no transcripts", where=f"{context.where}.dataset", hint="Set column to the one that has."
        )
    writer = _Writer(model, context, language, new_tokens)
    training = model.training
    model.eval()
    try:
        found = _listen(writer, clips, batch_size or (32 if gpu else 8))
        metrics = _score(found, context, dataset)
        count = (400 if gpu else 64) if speed_tokens is None else speed_tokens
        if count:
            metrics |= writer.speed(count, speed_batch or (128 if gpu else 4))
    finally:
        model.train(training)
    return metrics


class _Writer:
    """Greedy transcripts of samples by `generate`."""

    def __init__(self, model: Any, context: Context, language: str | None, new_tokens: int) -> None:
        self.model, self.device = model, context.device
        self.processor, self.tokenizer = context.tokenizer, context.tokenizer.tokenizer
        self.extractor = context.tokenizer.feature_extractor
        english = language is None or language.lower() in ENGLISH
        if getattr(self.tokenizer, "english_spelling_normalizer", {}) is None:
            # A checkpoint without the list of spellings: the other rules still apply.
            self.tokenizer.english_spelling_normalizer = {}
        name = "normalize" if english else "basic_normalize"
        self.normalise = getattr(self.tokenizer, name, None) or _lower
        self.most = new_tokens
        self.options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if language is not None and getattr(model.generation_config, "is_multilingual", False):
            self.options |= {"language": language, "task": "transcribe"}

    @property
    def seconds(self) -> float:
        """The longest clip the model hears at once."""
        samples: int | None = getattr(self.extractor, "n_samples", None)
        return samples / self.extractor.sampling_rate if samples else float("inf")

    def _inputs(self, clips: Sequence[Clip]) -> dict[str, Any]:
        import torch

        rate = self.extractor.sampling_rate
        inputs = self.extractor([clip.samples for clip in clips], sampling_rate=rate, return_tensors="pt")
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {
            name: value.to(self.device, dtype if torch.is_floating_point(value) else None)
            for name, value in inputs.items()
        }

    def _generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        import torch
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()  # settings of the checkpoint that do not apply need no warning
        try:
            with torch.inference_mode():
                return self.model.generate(**inputs, **self.options, **options)
        finally:
            logging.set_verbosity(level)

    def write(self, clips: Sequence[Clip]) -> list[str]:
        """What the model makes of some clips."""
        ids = self._generate(self._inputs(clips), max_new_tokens=self.most)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def speed(self, tokens: int, batch: int) -> dict[str, float]:
        """Time `tokens` tokens of `batch` clips of noise, past any end, after a warm-up; memory where it is CUDA's."""
        import numpy as np
        import torch

        positions = getattr(self.model.config, "max_target_positions", None)
        tokens = tokens if positions is None else min(tokens, positions - 8)  # room for a prefix
        second = self.extractor.sampling_rate
        noise = np.random.default_rng(0).normal(0, 0.05, second).astype(np.float32)
        inputs = self._inputs([Clip("noise", noise, second, None)] * batch)
        device = torch.device(self.device)
        self._timed(inputs, 4)
        if device.type == "cuda":
            remember_peaks()
            torch.cuda.reset_peak_memory_stats(device)
        metrics = {"tokens_per_second": batch * (tokens - 1) / self._timed(inputs, tokens)}
        if device.type == "cuda":
            metrics["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
        return metrics

    def _timed(self, inputs: dict[str, Any], tokens: int) -> float:
        """Seconds from the first token to the last."""
        from transformers import LogitsProcessor, LogitsProcessorList

        times: list[float] = []

        class Clock(LogitsProcessor):
            """Called once for every token."""

            def __call__(self, input_ids: Any, scores: Any) -> Any:
                synchronise(scores.device)
                times.append(time.perf_counter())
                return scores

        clock = LogitsProcessorList([Clock()])
        self._generate(inputs, max_new_tokens=tokens, min_new_tokens=tokens, logits_processor=clock)
        return times[-1] - times[0]


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _listen(writer: _Writer, clips: Any, batch_size: int) -> list[Transcribed]:
    """Transcribe all clips that have a reference; the pieces of a long one are joined again."""
    found = []
    with_text = (clip for clip in clips if clip.text is not None)
    while group := list(itertools.islice(with_text, batch_size)):
        parts = [(i, piece) for i, clip in enumerate(group) for piece in pieces(clip, writer.seconds)]
        texts = []
        for start in range(0, len(parts), batch_size):
            texts += writer.write([piece for _, piece in parts[start : start + batch_size]])
        for i, clip in enumerate(group):
            said = " ".join(text for (owner, _), text in zip(parts, texts) if owner == i)
            found.append(_compare(clip.name, writer.normalise(clip.text or ""), writer.normalise(said)))
    return found


def _compare(name: str, reference: str, hypothesis: str) -> Transcribed:
    import jiwer

    words = len(reference.split())
    if not words:  # jiwer refuses an empty reference
        return Transcribed(name, reference, hypothesis, 0, 0, 0, len(hypothesis.split()))
    out = jiwer.process_words(reference, hypothesis)
    return Transcribed(name, reference, hypothesis, words, out.substitutions, out.deletions, out.insertions)


def _score(found: Sequence[Transcribed], context: Context, dataset: str) -> dict[str, float]:
    import numpy as np

    words = sum(one.words for one in found)
    if not words:
        raise LillamaError(f"'{dataset}' has no words to compare with", where=f"{context.where}.dataset")
    worst = sorted(found, key=lambda one: (-one.errors, one.clip))[:WORST]
    context.details["worst"] = [
        {
            "clip": one.clip,
            "errors": one.errors,
            "words": one.words,
            "reference": one.reference,
            "hypothesis": one.hypothesis,
        }
        for one in worst
        if one.errors
    ]
    errors = np.array([one.errors for one in found])
    low, high = interval(errors, np.array([one.words for one in found]), context.seed)
    return {
        "wer": float(errors.sum()) / words,
        "wer_low": low,
        "wer_high": high,
        "words": float(words),
        "substitutions": float(sum(one.substitutions for one in found)),
        "deletions": float(sum(one.deletions for one in found)),
        "insertions": float(sum(one.insertions for one in found)),
    }


def interval(errors: NDArray[np.int64], words: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """The 95 % interval of errors per word, clips drawn anew with replacement RESAMPLES times (percentiles)."""
    import numpy as np
    from scipy.stats import bootstrap

    def rate(errors: NDArray[np.int64], words: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        return errors.sum(axis) / words.sum(axis).clip(1)

    if len(errors) < 2:  # which bootstrap refuses: there is nothing to draw from
        return float(rate(errors, words)), float(rate(errors, words))
    generator = np.random.default_rng(seed)
    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": RESAMPLES}
    found = bootstrap((errors, words), rate, random_state=generator, **options).confidence_interval
    return float(found.low), float(found.high)
