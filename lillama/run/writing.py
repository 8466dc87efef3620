"""How a model writes text: what texts begin with, in which rounds they are written, and the sampling itself.

Sampled from the original's own predictions; of each kind of beginning as many, so that a third begins as the chat
template begins a user's turn, a third as any text does, and a third with first words of texts of many kinds. It covers
what the model knows rather than the domain of one collection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from lillama.base.files import checksum
from lillama.data.special import find_around
from lillama.errors import LillamaError
from lillama.pretrained.predictions import draw_tokens
from lillama.recipe.schema import Generate
from lillama.run.openings import OPENINGS

WHERE = "calibration.generate"
MARK = "lillama-begins-here"  # stands for what a user says, to find what a template puts before it
PROMPTS = "prompts"

Beginnings = dict[str, list[list[int]]]  # by kind, the token ids that its texts begin with in turn


@dataclass(frozen=True)
class Round:
    """Texts that are written at once, all of one kind: the first of them takes the beginning `first` of its kind."""

    number: int
    kind: str
    first: int
    texts: int


@dataclass(frozen=True)
class Writing:
    """How much is written, and how: tokens in all, tokens of one text, texts at once, temperatures in turn, seed."""

    tokens: int
    length: int = 512
    batch: int = 32
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    where: str = WHERE  # the section of the recipe, for errors

    @classmethod
    def of(cls, section: Generate, tokens: int, most: int | None, where: str = WHERE) -> Writing:
        """What a recipe says; no text is longer than `most` positions."""
        length = min(section.length, most or section.length)
        given = section.temperature
        temperatures = tuple(given) if isinstance(given, list) else (given,)
        return cls(tokens, length, section.batch, temperatures, section.seed, where)

    @property
    def texts(self) -> int:
        """How many texts there will be."""
        return max(1, -(-self.tokens // self.length))

    def temperature(self, number: int, beginnings: int) -> float:
        """That of a kind's text of this number: in turn, so that each of so many beginnings meets all of them."""
        return self.temperatures[(number % beginnings + number // beginnings) % len(self.temperatures)]


def rounds(writing: Writing, kinds: Sequence[str]) -> list[Round]:
    """The rounds of the writing: kinds in turn, of each as many, texts shared out evenly among them."""
    left = writing.texts
    count = -(-left // writing.batch)
    count += -count % len(kinds)
    found, begun = [], dict.fromkeys(kinds, 0)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        texts = -(-left // (count - number))  # evenly, so that no kind takes what is the other's
        left -= texts
        if texts:
            found.append(Round(number, kind, begun[kind], texts))
            begun[kind] += texts
    return found


def write_round(model: Any, tokenizer: Any, begin: list[list[int]], writing: Writing, this: Round) -> list[str]:
    """The texts of one round, whatever was written before it: `writing.length` tokens each, special ones kept."""
    model.generation_config = _greedy(tokenizer)
    numbers = range(this.first, this.first + this.texts)
    chosen = [begin[number % len(begin)] for number in numbers]
    temperatures = torch.tensor([writing.temperature(number, len(begin)) for number in numbers], device=model.device)
    longest = max(map(len, chosen))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in chosen], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in chosen], device=model.device)
    drawn = Drawn(temperatures[:, None], int(checksum([writing.seed, this.number])[:15], 16), model.device)
    with torch.inference_mode():
        new = max(1, writing.length - longest)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=new, logits_processor=[drawn])
    if not drawn.finite:
        raise LillamaError(
            "the model's predictions are not finite", where=writing.where, hint="Try run.compute: float32."
        )
    rows = [row[longest - len(one) :] for row, one in zip(written.cpu(), chosen)]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def beginnings(
    tokenizer: Any, section: Generate, prompts: Sequence[str] = (), length: int = 512, where: str = WHERE
) -> Beginnings:
    """What texts begin with, by kind; prompts of more than half of `length` tokens are cut there.

    Raises LillamaError where the tokenizer has nothing of what the section wants.
    """
    found: Beginnings = {}
    if "user" in section.begin and (user := _user(tokenizer)):
        found["user"] = [user]
    before = list(find_around(tokenizer, "auto").before)
    if "start" in section.begin and (start := before or _token(tokenizer)):
        found["start"] = [start]
    most = max(1, length // 2 - len(before))
    openings = _openings(tokenizer, section.seed) if "openings" in section.begin else []
    for kind, encoded in (("openings", openings), (PROMPTS, _encoded(tokenizer, prompts))):
        found[kind] = [before + ids[:most] for ids in encoded if before or ids]
    found = {kind: ids for kind, ids in found.items() if ids}
    if not found:
        raise LillamaError(
            "the tokenizer has no token that a text begins with",
            where=f"{where}.begin",
            hint=f"Give {where}.prompts, or data.",
        )
    return found


def _openings(tokenizer: Any, seed: int) -> list[list[int]]:
    """The openings' token ids in an order of the seed, without those of which the tokenizer lacks a word."""
    encoded = _encoded(tokenizer, OPENINGS)
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    return [encoded[n] for n in order if encoded[n] and tokenizer.unk_token_id not in encoded[n]]


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def interleave(texts: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(kind, text) of all texts, kinds in turn, so that every part of them has all kinds."""
    for row in itertools.zip_longest(*texts.values()):
        yield from ((kind, text) for kind, text in zip(texts, row) if text is not None)


def _user(tokenizer: Any) -> list[int]:
    """What the chat template puts before what a user says; nothing where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": MARK}]
    before, mark, _ = tokenizer.apply_chat_template(turns, tokenize=False).partition(MARK)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if mark and before else []


def _token(tokenizer: Any) -> list[int]:
    token = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    return [] if token is None else [token]


def _greedy(tokenizer: Any) -> GenerationConfig:
    """The token that `Drawn` leaves above all others; what ends a turn or a text does not end the writing."""
    config = GenerationConfig(do_sample=False)
    config.pad_token_id = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return config


class Drawn(LogitsProcessor):
    """Draws the next token of every text by its chance at its temperature [texts, 1], and puts it above all others.

    The sampling of `generate` draws a number for every token of the vocabulary, which on a processor took a fifth of
    the time of SmolLM2-135M's writing.
    """

    def __init__(self, temperature: Tensor, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self.generator = torch.Generator(device).manual_seed(seed)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all that was drawn had a chance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = draw_tokens(scores / self.temperature, self.generator)[:, None]
        self.finite &= scores.gather(1, chosen).isfinite().all()
        return scores.scatter(1, chosen, torch.inf)
