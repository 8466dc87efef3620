"""Speech as calibration batches and fine-tuning examples: every clip is encoded once, and transcribed if need be."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama.data.audio import Clip, Clips, pieces, read_clips
from lillama.data.augment import altered
from lillama.errors import LillamaError
from lillama_whisper.teacher import Heard, Teacher, loops

if TYPE_CHECKING:
    from lillama import Recipe
    from lillama.base.progress import Progress

SHORTEST = 0.1  # seconds: below, there is nothing to transcribe
LONGER = 16  # tokens a sampled transcript may have more than the longest beside it
AHEAD = 8  # groups of clips that are read at once, to be sorted by length: one that is long keeps short ones waiting

log = logging.getLogger(__name__)


def calibration_batches(recipe: Recipe, progress: Progress) -> list[dict[str, Tensor]]:
    """Batches of encoder states, decoder inputs and their mask, the encoder's work done.

    `encoder_outputs` is [1, B, T, D]: the model takes what it is given for a tuple, and its first element. With
    variants, batches of one group of clips share their states. The last groups, which the engine holds out, have
    neither variants nor altered copies.
    """
    section, size = recipe.calibration, recipe.distill.batch_size
    teacher = Teacher(recipe)
    clips = read_clips(
        section.one_dataset(),
        config=section.config,
        split=section.split,
        column=section.column,
        rate=teacher.rate,
        where="calibration",
        fraction=section.fraction,
        seed=section.seed,
    )
    more = section.variants + section.augment
    held = held_out(-(-len(clips) // size), more, recipe.distill.holdout)
    groups: list[_Group] = []
    tokens = 0
    for group in _heard(teacher, clips, size, progress):
        groups.append(group)
        tokens += sum(len(sequence) - 1 for sequence in group.sequences)
        if section.tokens is not None and tokens >= section.tokens:
            break
    learned = groups[: len(groups) - held] if more else []
    batches = [_batch(teacher, group, group.sequences) for group in learned]
    if learned and section.augment:
        copies = _altered(teacher, learned, section.augment, progress)
        batches += [_batch(teacher, group, group.sequences) for group in copies]
    if learned and section.variants:
        with progress.phase("sample transcripts", len(learned) * section.variants) as bar:
            for group, number in itertools.product(learned, range(section.variants)):
                batches.append(_batch(teacher, group, _sampled(teacher, group, number, section.variants)))
                bar.advance()
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(section.seed)).tolist()
    return [batches[i] for i in order] + [_batch(teacher, group, group.sequences) for group in groups[len(learned) :]]


def held_out(groups: int, variants: int, share: float) -> int:
    """How many groups have no variants, so that the batches the engine holds out are of clips it does not see."""
    held = 0
    while share and held < groups - 1 and held < round(((groups - held) * (1 + variants) + held) * share):
        held += 1
    return max(held, 1) if share and groups > 1 else held


@dataclass
class _Group:
    """Some clips with their encoder states [B, T, D], whole token sequences, and the digests of what they came from."""

    clips: list[Clip]
    heard: Heard
    sequences: list[list[int]]
    sources: list[str]


def _group(
    teacher: Teacher, clips: Sequence[Clip], keep: Callable[[Tensor], Tensor], of: Sequence[Clip] = ()
) -> _Group:
    """Clips as the teacher hears them, their states kept by `keep`, without those whose transcript of its own loops.

    `of`: the clips that these are altered copies of. Where all transcripts loop they stay: the model writes nothing
    else, as one of random weights.
    """
    heard, sources = teacher.hear(clips), [clip.digest for clip in of or clips]
    good = [i for i, clip in enumerate(clips) if clip.text is not None or not loops(heard.texts[i])]
    if 0 < len(good) < len(clips):
        clips, heard, sources = [clips[i] for i in good], heard.only(good), [sources[i] for i in good]
    heard.states = keep(heard.states)
    sequences = [teacher.tokens.sequence(*said) for said in zip(heard.texts, heard.languages)]
    return _Group(list(clips), heard, sequences, sources)


def _heard(
    teacher: Teacher, clips: Clips, size: int, progress: Progress, enough: float | None = None
) -> Iterator[_Group]:
    """The clips in groups of at most `size`, heard by the teacher; stops after `enough` seconds of speech."""
    keep: Callable[[Tensor], Tensor] = teacher.keeper(len(clips))
    short = (piece for clip in clips for piece in pieces(clip, teacher.seconds) if piece.seconds >= SHORTEST)
    seconds, dropped = 0.0, 0
    try:
        with progress.phase("transcribe and encode", len(clips)) as bar:
            for group in _alike(short, size):
                found = _group(teacher, group, keep)
                bar.advance(len(group), tokens=sum(map(len, found.sequences)))
                dropped += len(group) - len(found.clips)
                yield found
                seconds += sum(clip.seconds for clip in found.clips)
                if enough is not None and seconds >= enough:
                    break
    finally:  # whoever has read enough tokens goes no further
        if dropped:
            log.warning("left out %d clips for which the original writes the same words over and over", dropped)


def _alike(clips: Iterator[Clip], size: int) -> Iterator[list[Clip]]:
    """Groups of `size` clips of about the same length, the groups in no order: the last ones may be held out."""
    generator = torch.Generator().manual_seed(0)
    while ahead := list(itertools.islice(clips, AHEAD * size)):
        ahead.sort(key=lambda clip: clip.seconds)
        groups = [ahead[i : i + size] for i in range(0, len(ahead), size)]
        for i in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[i]


def _altered(teacher: Teacher, groups: list[_Group], copies: int, progress: Progress) -> Iterator[_Group]:
    """Every group of clips again, altered, `copies` times."""
    keep: Callable[[Tensor], Tensor] = teacher.keeper(sum(len(group.clips) for group in groups) * copies)
    with progress.phase("alter and transcribe", len(groups) * copies) as bar:
        for group in groups:
            for clips in zip(*(list(altered(clip, copies, teacher.seconds)) for clip in group.clips)):
                found = _group(teacher, clips, keep, group.clips)
                bar.advance(tokens=sum(map(len, found.sequences)))
                yield found


def _sampled(teacher: Teacher, group: _Group, number: int, count: int) -> list[list[int]]:
    """Variant `number` of the group's sequences, hardly longer than the transcripts."""
    most = max(map(len, group.sequences)) + LONGER
    return teacher.sample(group.clips, group.heard, number, count, most)


def _batch(teacher: Teacher, group: _Group, sequences: list[list[int]]) -> dict[str, Tensor]:
    # The end of the text is predicted, never read.
    inputs = [torch.tensor(sequence[:-1]) for sequence in sequences]
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
    """Examples of encoder states, decoder inputs and labels, by hours of speech where the recipe says so.

    One per clip, and one per further transcript and altered copy of it that the recipe asks for.

    What the section leaves open (dataset, config, split, column) is that of the calibration.
    """
    section, base = recipe.finetune, recipe.calibration
    if section is None:
        raise LillamaError("the recipe has no such section", where="finetune")
    if section.datasets is not None:
        hint = "Give finetune.dataset, or neither, to train on the calibration's."
        raise LillamaError("speech is read from one data set", where="finetune.datasets", hint=hint)
    own = section.dataset is not None
    teacher = Teacher(recipe)
    clips = read_clips(
        section.dataset or base.one_dataset(),
        config=section.config if own else section.config or base.config,
        split=section.split or ("train" if own else base.split),
        column=section.column if own else section.column or base.column,
        rate=teacher.rate,
        where="finetune" if own else "calibration",
        seed=section.seed,
    )
    enough = None if section.hours is None else section.hours * 3600
    groups = list(_heard(teacher, clips, section.batch_size, progress, enough))
    examples: list[dict[str, Any]] = []
    for group in groups:
        examples += _examples(teacher, group, group.sequences)
        for number in range(section.variants):
            sequences = _sampled(teacher, group, number, section.variants)
            examples += _examples(teacher, group, sequences)
    if section.augment:
        for group in _altered(teacher, groups, section.augment, progress):
            examples += _examples(teacher, group, group.sequences)
    return examples


def _examples(teacher: Teacher, group: _Group, sequences: list[list[int]]) -> list[dict[str, Any]]:
    """Every clip of a group as an example, under the name of the clip it was made of."""
    return [
        {
            "encoder_outputs": (states,),
            "decoder_input_ids": torch.tensor(sequence[:-1]),
            "labels": torch.tensor(teacher.tokens.labels(sequence, language)),
            "source": source,
        }
        for states, sequence, language, source in zip(
            group.heard.states, sequences, group.heard.languages, group.sources
        )
    ]
