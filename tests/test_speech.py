"""The evaluator `wer`: what it counts, what it is sure of, and what it says of a model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech_models import MULTILINGUAL, folder, manifest, processor, whisper

from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.speech import interval, wer


class Reader(torch.nn.Module):
    """Stands for a recogniser: writes given texts, a list for each call of `generate`."""

    def __init__(self, tokenizer, texts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.texts, self.calls = tokenizer, list(texts), []
        self.config = type("Config", (), {"max_target_positions": 448})()
        self.generation_config = type("Generation", (), {"is_multilingual": True})()

    def generate(self, input_features, **options):
        assert not self.training and input_features.dtype == torch.float32
        self.calls.append(options)
        texts, self.texts = self.texts[: len(input_features)], self.texts[len(input_features) :]
        ids = [torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(ids, True, self.tokenizer.eos_token_id)


def measure(directory, texts, **options):
    reading = processor()
    model = Reader(reading.tokenizer, texts).train()
    context = Context(reading, "cpu")
    metrics = wer(model, context, dataset=str(directory), speed_tokens=0, **options)
    assert model.training, "the evaluator must leave the model as it was"
    return metrics, context, model


def speech(tmp_path, texts):
    directory = folder(tmp_path / "speech", len(texts))
    manifest(directory, [{"audio": f"audio/{i}.flac", "text": text} for i, text in enumerate(texts)])
    return directory


def test_errors_are_counted_by_kind_over_all_words(tmp_path):
    directory = speech(tmp_path, ["the cat sat", "on a mat", "and ran"])
    metrics, context, _ = measure(directory, ["the dog sat", "on mat", "and then ran"], batch_size=2)
    assert metrics["words"] == 8
    assert (metrics["substitutions"], metrics["deletions"], metrics["insertions"]) == (1, 1, 1)
    assert metrics["wer"] == pytest.approx(3 / 8)
    assert metrics["wer_low"] <= metrics["wer"] <= metrics["wer_high"]
    assert [one["clip"] for one in context.details["worst"]] == ["0.flac", "1.flac", "2.flac"]
    assert context.details["worst"][0]["hypothesis"] == "the dog sat"


def test_english_is_normalised_by_whispers_rules(tmp_path):
    metrics, _, _ = measure(speech(tmp_path, ["Mr. Smith's colour: twenty-one!"]), ["mister smith's color 21"])
    assert metrics["wer"] == 0


def test_other_languages_are_normalised_by_the_basic_rules_and_asked_for(tmp_path):
    metrics, _, model = measure(speech(tmp_path, ["Ina, KWANA. Mr"]), ["ina kwana mr"], language="ha")
    assert metrics["wer"] == 0
    assert model.calls[0]["language"] == "ha" and model.calls[0]["task"] == "transcribe"


def test_clips_without_reference_are_left_out_and_an_empty_one_counts_insertions(tmp_path):
    metrics, _, _ = measure(speech(tmp_path, ["a cat", None, "[noise]"]), ["a cat", "noise here"])
    assert (metrics["words"], metrics["insertions"]) == (2, 2)


def test_the_ten_worst_are_told_and_the_good_ones_not(tmp_path):
    texts = [f"word{i} is here" for i in range(14)]
    _, context, _ = measure(speech(tmp_path, texts), ["nothing at all"] * 12 + texts[12:])
    assert len(context.details["worst"]) == 10
    json.dumps(context.details)


def test_long_audio_is_heard_in_pieces(tmp_path):
    import soundfile
    from speech_models import RATE, tone

    directory = folder(tmp_path / "speech", 1)
    soundfile.write(directory / "audio/0.flac", tone(5.0), RATE)  # the model hears two seconds
    manifest(directory, [{"audio": "audio/0.flac", "text": "one two three"}])
    metrics, _, _ = measure(directory, ["one", "two", "three"])
    assert metrics["wer"] == 0


def test_data_without_transcripts_is_refused(tmp_path):
    directory = folder(tmp_path / "speech", 1)
    manifest(directory, [{"audio": "audio/0.flac"}])
    with pytest.raises(LillamaError, match=r"evaluate\.dataset: .* has no transcripts"):
        measure(directory, [])


def test_a_text_model_is_refused(tmp_path):
    reading = processor()
    with pytest.raises(LillamaError, match="no speech recogniser"):
        wer(Reader(reading.tokenizer, []), Context(reading.tokenizer, "cpu"), dataset=str(folder(tmp_path / "a", 1)))


def test_a_real_model_generates_in_batches_and_is_timed(tmp_path):
    directory = folder(tmp_path / "speech", 3)
    results = []
    for batch_size in (1, 3):
        context = Context(processor(), "cpu")
        results.append(
            wer(whisper(), context, dataset=str(directory), batch_size=batch_size, new_tokens=8, speed_tokens=12)
        )
    assert results[0]["tokens_per_second"] > 0
    for metric in ("wer", "substitutions", "deletions", "insertions"):
        assert results[0][metric] == results[1][metric], "the batch size must not change what is heard"


def test_a_multilingual_model_takes_a_language(tmp_path):
    metrics = wer(
        whisper(MULTILINGUAL),
        Context(processor(MULTILINGUAL), "cpu"),
        dataset=str(folder(tmp_path / "speech", 2)),
        language="ha",
        new_tokens=6,
        speed_tokens=0,
    )
    assert metrics["words"] == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(0, 99))
def test_the_interval_repeats_and_holds_the_rate_of_equal_clips(pairs, seed):
    errors, words = (np.array(column) for column in zip(*pairs))
    low, high = interval(errors, words, seed)
    assert (low, high) == interval(errors, words, seed)
    assert min(errors / words) - 1e-9 <= low <= high <= max(errors / words) + 1e-9


def test_listing_the_options_imports_neither_torch_nor_audio():
    code = (
        "import sys, lillama.registry as r; r.EVALUATORS.options('wer');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'soundfile', 'jiwer') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
