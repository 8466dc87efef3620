"""Examples to fine-tune on: blocks of text, split into what is learned and what is held out, padded to batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from lillama.errors import LillamaError
from lillama.recipe.schema import Finetune, Recipe

IGNORED = -100
SHARE = "teacher_share"  # of an example: in place of finetune.teacher


Examples = list[dict[str, Any]]
Written = Callable[[Literal["calibration", "finetune"]], Path]  # the file of what a section has the original write


def text_examples(tokenizer: Any, recipe: Recipe, section: Finetune, written: Written | None = None) -> Examples:
    """Blocks of text as examples of a causal model; the data are the calibration's unless the section names some.

    `written` gives the file of the original's own text, by the section that has it write. Where of a source another
    share of the loss than `section.teacher` is the distance to the original's predictions, every example has its SHARE.
    """
    from lillama.data.special import find_around, text_tokenizer
    from lillama.data.text import sourced_blocks

    more = ""
    if section.generate is not None:
        if written is None:
            raise LillamaError("nothing here has the model write its own text", where="finetune.generate")
        more = str(written("finetune"))
    data = section.data(recipe.calibration, more)
    where = "finetune" if section.has_data or section.generate is not None else "calibration"
    own = written and functools.partial(written, "calibration")
    blocks, sources = sourced_blocks(tokenizer, data, where, ended=False, own=own)
    labels = blocks.clone()
    labels[:, : len(find_around(text_tokenizer(tokenizer), data.special_tokens).before)] = IGNORED
    examples: Examples = [{"input_ids": block, "labels": label} for block, label in zip(blocks, labels)]
    shares = section.shares(data)
    if any(share != section.teacher for share in shares):
        for example, source in zip(examples, sources.tolist()):
            example[SHARE] = torch.tensor(shares[source])
    return examples


def of_model(inputs: dict[str, Any]) -> dict[str, Any]:
    """Of a batch the arguments of the model, which labels and shares are not."""
    return {name: value for name, value in inputs.items() if name not in ("labels", SHARE)}


def split(examples: Examples, share: float, generator: torch.Generator) -> tuple[Examples, Examples]:
    """(to learn from, held out): about `share` of the examples, all those of one `source` on the same side."""
    sources = [example.get("source", number) for number, example in enumerate(examples)]
    order = list(dict.fromkeys(sources[i] for i in torch.randperm(len(examples), generator=generator).tolist()))
    count = min(max(round(len(order) * share), 1), len(order) - 1) if share else 0
    away = set(order[:count])
    parts: tuple[Examples, Examples] = ([], [])
    for source, example in zip(sources, examples):
        parts[source in away].append({name: value for name, value in example.items() if name != "source"})
    return parts


def updates(examples: int, section: Finetune) -> int:
    """How many updates the section's epochs take."""
    return max(math.ceil(examples / (section.batch_size * section.gradient_accumulation)) * section.epochs, 1)


class Collator:
    """Makes a batch of examples: tensors of one dimension are padded (labels with -100), others stacked."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, examples: Examples) -> dict[str, Any]:
        return {name: self._column(name, [example[name] for example in examples]) for name in examples[0]}

    def _column(self, name: str, values: list[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(self._column(name, list(parts)) for parts in zip(*values))
        if values[0].dim() != 1:
            return torch.stack(values)
        value = IGNORED if name == "labels" else 0 if name.endswith("mask") else self.padding
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)
