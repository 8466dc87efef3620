"""A tiny Whisper, its processor and folders of synthetic speech: tones that no one has to understand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte has one: any text can be written
ENGLISH = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
MULTILINGUAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|ha|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]
RATE = 16000


def config(special: list[str] = ENGLISH, **changes) -> WhisperConfig:
    """A Whisper of two layers that hears two seconds."""
    end = len(LETTERS)
    settings = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": end + len(special),
        "num_mel_bins": 8,
        "max_source_positions": 100,
        "max_target_positions": 40,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": end + 1,
        "begin_suppress_tokens": [end],
        "suppress_tokens": [],
    }
    return WhisperConfig(**settings | changes)


def whisper(special: list[str] = ENGLISH, seed: int = 0, **changes) -> WhisperForConditionalGeneration:
    """The model, randomly initialised, with what its generation needs to know."""
    torch.manual_seed(seed)
    settings = config(special, **changes)
    model = WhisperForConditionalGeneration(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    ids = {token: len(LETTERS) + i for i, token in enumerate(special)}
    common = {key: getattr(settings, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    more = {}
    if special is MULTILINGUAL:
        more = {
            "lang_to_id": {token: ids[token] for token in ("<|en|>", "<|ha|>")},
            "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        }
    model.generation_config = GenerationConfig(
        **common,
        **more,
        decoder_start_token_id=settings.decoder_start_token_id,
        begin_suppress_tokens=settings.begin_suppress_tokens,
        is_multilingual=special is MULTILINGUAL,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        return_timestamps=False,
        max_length=settings.max_target_positions,
    )
    return model


def processor(special: list[str] = ENGLISH) -> WhisperProcessor:
    """Features of two seconds in eight bands; a tokenizer that spells."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token=ENGLISH[0], extra_special_tokens=special)
    tokenizer.english_spelling_normalizer = {"colour": "color"}
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    return WhisperProcessor(extractor, tokenizer)


def save(directory: Path, special: list[str] = ENGLISH, **changes) -> Path:
    """Model and processor as a checkpoint directory."""
    whisper(special, **changes).save_pretrained(directory)
    processor(special).save_pretrained(directory)
    return directory


def tone(seconds: float, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    """A tone that swells and fades, float32."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * t) * np.sin(np.pi * t / max(seconds, 1e-9))).astype(np.float32)


def folder(directory: Path, clips: int = 6, text: str | None = "hello") -> Path:
    """An audio folder of `clips` tones of different pitch."""
    (directory / "audio").mkdir(parents=True)
    rows = []
    for i in range(clips):
        soundfile.write(directory / f"audio/{i}.flac", tone(0.5 + 0.1 * i, pitch=200.0 + 50 * i), RATE)
        rows.append({"audio": f"audio/{i}.flac", "text": text})
    manifest(directory, rows)
    return directory


def manifest(directory: Path, rows: list[dict]) -> None:
    """Write manifest.jsonl."""
    (directory / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
