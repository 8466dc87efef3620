"""What the decoder reads: a prefix that says the language and the task, the transcript, and its end."""

from __future__ import annotations

from typing import Any

IGNORED = -100  # torch's label of a position where nothing is learned


class Tokens:
    """Token sequences of a Whisper model, English-only or multilingual, without timestamps."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        generation = model.generation_config
        self.most: int = model.config.max_target_positions
        self.start: int = model.config.decoder_start_token_id
        self.end: int = model.config.eos_token_id
        self.multilingual = bool(getattr(generation, "is_multilingual", False))
        self.without_times: int | None = getattr(generation, "no_timestamps_token_id", None)
        if self.without_times is None:
            self.without_times = tokenizer.get_vocab().get("<|notimestamps|>")
        self.transcribe: int | None = (getattr(generation, "task_to_id", None) or {}).get("transcribe")

    def prefix(self, language: int | None) -> list[int]:
        """<|startoftranscript|> [language, task] <|notimestamps|>; `language` is a token, None for an English model."""
        asked = [language, self.transcribe] if self.multilingual else []
        return [token for token in (self.start, *asked, self.without_times) if token is not None]

    def sequence(self, text: str, language: int | None) -> list[int]:
        """The whole sequence of a transcript, the end of text included, cut to the model's positions."""
        # Whisper was trained on words that follow a space, the first one too.
        words = self.tokenizer(f" {spoken(text)}", add_special_tokens=False)["input_ids"] if text else []
        return [*self.prefix(language), *words, self.end][: self.most]

    def labels(self, sequence: list[int], language: int | None) -> list[int]:
        """What each position but the last has to predict; the prefix, given in use, is not learned."""
        given = len(self.prefix(language)) - 1
        return [IGNORED] * given + sequence[given + 1 :]


def spoken(text: str) -> str:
    """A transcript as a sentence: corpora in capitals (LibriSpeech) would be spelt out letter by letter."""
    text = " ".join(text.split())
    return text.capitalize() if text.isupper() else text
