"""Text that a model writes itself: what it is calibrated on where no data is given.

Sampled at temperature 1 from the original's own predictions; half of it begins as the chat template begins a user's
turn, half as any text does. It covers what the model knows rather than the domain of one collection.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lillama.base import device as devices
from lillama.base.files import write_text
from lillama.base.progress import Progress
from lillama.base.rundir import ORIGINAL
from lillama.checkpoint.open import open_model
from lillama.data.special import find_around, text_tokenizer
from lillama.errors import LillamaError
from lillama.pretrained.locate import read_tokenizer
from lillama.recipe.schema import Recipe
from lillama.run.prepare import open_source

HINT = "Give data: --data FILE, a folder or a hub id."
MARK = "lillama-begins-here"  # stands for what a user says, to find what a template puts before it


@dataclass(frozen=True)
class Writing:
    """How much is written: tokens in all, tokens of one text, texts at once, and the seed of the sampling."""

    tokens: int = 65536
    length: int = 512
    batch: int = 32
    seed: int = 0


def write_own_text(recipe: Recipe, path: Path, writing: Writing, progress: Progress) -> None:
    """Have the recipe's model write texts to `path`, a .jsonl file with one `text` a line.

    The file appears when all is written. Special tokens stay in the texts, so that they are read back as they were
    written. Raises LillamaError for a model that does not continue text.
    """
    chosen = devices.choose(recipe.run.device, recipe.run.compute)
    source = open_source(recipe, chosen)
    if source.auto_class is not AutoModelForCausalLM or source.config.is_encoder_decoder:
        raise LillamaError(
            f"{type(source.model).__name__} does not continue text, so it cannot write its own", where="data", hint=HINT
        )
    with tempfile.TemporaryDirectory() as spare:
        place = source.fetch(Path(spare))
        tokenizer = read_tokenizer(recipe.model, source.where, source.gguf, Path(spare) / ORIGINAL)
        model = open_model(place, chosen.compute, source.auto_class, recipe.model.trust_remote_code)
    tokenizer = text_tokenizer(tokenizer)
    model.to(chosen.device)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts(model, tokenizer, writing, progress)]
    write_text(path, "\n".join(lines) + "\n")


def texts(model: Any, tokenizer: Any, writing: Writing, progress: Progress) -> Iterator[str]:
    """Texts that `model` writes from its beginnings on: `writing.length` tokens each, about `writing.tokens` in all."""
    model.generation_config = _sampling(tokenizer)
    kinds = beginnings(tokenizer)
    left = max(1, -(-writing.tokens // writing.length))  # texts
    rounds = -(-left // writing.batch)
    rounds += rounds % len(kinds)  # of each kind as many
    with progress.phase("the model writes", rounds) as bar, torch.random.fork_rng():
        torch.manual_seed(writing.seed)
        for number in range(rounds):
            begin = kinds[number % len(kinds)]
            rows = -(-left // (rounds - number))  # shared out evenly, so that no kind takes what is the other's
            left -= rows
            if not rows:
                continue
            ids = torch.tensor([begin] * rows, device=model.device)
            with torch.inference_mode():
                new = max(1, writing.length - len(begin))
                written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
            bar.advance(tokens=written.numel())
            yield from tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def beginnings(tokenizer: Any) -> list[list[int]]:
    """The ids that texts begin with: of a user's turn, where there is a chat template, and of any text.

    Raises LillamaError where the tokenizer has no token that a text begins or ends with.
    """
    found: list[list[int]] = []
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": MARK}]
        before, mark, _ = tokenizer.apply_chat_template(turns, tokenize=False).partition(MARK)
        if mark and before:
            found.append(list(tokenizer(before, add_special_tokens=False)["input_ids"]))
    start = list(find_around(tokenizer, "auto").before)
    if not start:
        token = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        start = [] if token is None else [token]
    if start:
        found.append(start)
    if not found:
        raise LillamaError("the tokenizer has no token that a text begins with", where="data", hint=HINT)
    return found


def _sampling(tokenizer: Any) -> GenerationConfig:
    """Sampling from the predictions as they are; what ends a turn or a text does not end the writing."""
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    config.pad_token_id = pad
    return config
