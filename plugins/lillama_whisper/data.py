"""Speech as calibration batches and fine-tuning examples: every clip is encoded once, and transcribed if need be."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama.audio import Clip, Clips, pieces, read_clips, vary
from lillama.errors import LillamaError
from lillama_whisper.teacher import Heard, Teacher

if TYPE_CHECKING:
    from lillama import Recipe
    from lillama.progress import Progress

SHORTEST = 0.1  # seconds: below, there is nothing to transcribe


def calibration_batches(recipe: Recipe, progress: Progress) -> Iterator[dict[str, Tensor]]:
    """Batches of encoder states, decoder inputs and their mask, in shuffled order, the encoder's work done.

    `encoder_outputs` is [1, B, T, D]: the model takes what it is given for a tuple, and its first element.
    """
    section = recipe.calibration
    teacher = Teacher(recipe)
    clips = read_clips(
        section.dataset,
        config=section.config,
        split=section.split,
        column=section.column,
        rate=teacher.rate,
        where="calibration",
        fraction=section.fraction,
        seed=section.seed,
    )
    size = recipe.distill.batch_size
    held = _held_out(len(clips) * (1 + section.variants), size, recipe.distill.holdout)
    source = _Varied(clips, teacher.seconds, section.variants, held)
    tokens = 0
    for group in _heard(teacher, source, size, progress):
        yield _batch(teacher, group)
        tokens += sum(len(sequence) - 1 for sequence in group.sequences)
        if section.tokens is not None and tokens >= section.tokens:
            return


def _held_out(clips: int, size: int, share: float) -> int:
    """How many clips the batches hold that the engine keeps out of training: the last ones."""
    return max(round(-(-clips // size) * share), 1) * size if share else 0


@dataclass
class _Varied:
    """Variants of the clips, `times` each, and then the clips themselves.

    The last `held` clips have no variants: they stay unseen where they are held out.
    """

    clips: Clips
    seconds: float
    times: int
    held: int

    def __len__(self) -> int:
        return len(self.clips) + self.times * max(len(self.clips) - self.held, 0)

    def __iter__(self) -> Iterator[Clip]:
        for seed in range(self.times):
            before = None
            for clip in itertools.islice(self.clips, max(len(self.clips) - self.held, 0)):
                yield vary(clip, before, self.seconds, seed)
                before = clip
        yield from self.clips


@dataclass
class _Group:
    """Some clips with their encoder states [B, T, D] and whole token sequences."""

    clips: list[Clip]
    heard: Heard
    sequences: list[list[int]]


def _heard(
    teacher: Teacher, clips: Clips | _Varied, size: int, progress: Progress, enough: float | None = None
) -> Iterator[_Group]:
    """The clips in groups of `size`, heard by the teacher; stops after `enough` seconds of speech."""
    keep: Callable[[Tensor], Tensor] = teacher.keeper(len(clips))
    short = (piece for clip in clips for piece in pieces(clip, teacher.seconds) if piece.seconds >= SHORTEST)
    seconds = 0.0
    with progress.phase("transcribe and encode", len(clips)) as bar:
        while group := list(itertools.islice(short, size)):
            heard = teacher.hear(group)
            heard.states = keep(heard.states)
            sequences = [teacher.tokens.sequence(*said) for said in zip(heard.texts, heard.languages)]
            bar.advance(len(group), tokens=sum(map(len, sequences)))
            yield _Group(group, heard, sequences)
            seconds += sum(clip.seconds for clip in group)
            if enough is not None and seconds >= enough:
                return


def _batch(teacher: Teacher, group: _Group) -> dict[str, Tensor]:
    # The end of the text is predicted, never read.
    inputs = [torch.tensor(sequence[:-1]) for sequence in group.sequences]
    padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=teacher.tokens.end)
    lengths = torch.tensor([len(ids) for ids in inputs])
    said = "".join(clip.digest for clip in group.clips) + teacher.identity
    return {
        "encoder_outputs": group.heard.states[None],
        "decoder_input_ids": padded,
        "loss_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "digest": torch.tensor(list(hashlib.sha256(said.encode()).digest()), dtype=torch.uint8),
    }


def finetune_examples(recipe: Recipe, progress: Progress) -> list[dict[str, Any]]:
    """One example per clip: encoder states, decoder inputs and labels; by hours of speech where the recipe says so.

    What the section leaves open (dataset, config, split, column) is that of the calibration.
    """
    section, base = recipe.finetune, recipe.calibration
    if section is None:
        raise LillamaError("the recipe has no such section", where="finetune")
    own = section.dataset is not None
    teacher = Teacher(recipe)
    clips = read_clips(
        section.dataset or base.dataset,
        config=section.config if own else section.config or base.config,
        split=section.split or ("train" if own else base.split),
        column=section.column if own else section.column or base.column,
        rate=teacher.rate,
        where="finetune" if own else "calibration",
        seed=section.seed,
    )
    examples: list[dict[str, Any]] = []
    enough = None if section.hours is None else section.hours * 3600
    for group in _heard(teacher, clips, section.batch_size, progress, enough):
        for states, sequence, language in zip(group.heard.states, group.sequences, group.heard.languages):
            labels = teacher.tokens.labels(sequence, language)
            examples.append(
                {
                    "encoder_outputs": (states,),
                    "decoder_input_ids": torch.tensor(sequence[:-1]),
                    "labels": torch.tensor(labels),
                }
            )
    return examples
