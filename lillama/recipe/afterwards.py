"""The sections of a recipe that say what becomes of a compressed model: training as a whole, and few bits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lillama.recipe.calibration import BOTH, NO_TOKENS, OF_ONE, Calibration, Data, Generate, of_one, with_spare
from lillama.recipe.section import Section


class Lora(Section):
    """Adapters that learn in place of the weights themselves (LoRA); merged before the result is saved."""

    rank: int = Field(16, ge=1, description="Rank of every adapter.")
    alpha: int | None = Field(None, ge=1, description="Adapters are scaled by alpha / rank; null: by 1.")
    on: Literal["factors", "dense", "all"] = Field(
        "all", description="What gets adapters: the factors, the linears that stayed dense, or both."
    )


class Lesson(Data):
    """One data set of several to train on."""

    weight: float = Field(1.0, gt=0, description="Its share of finetune.tokens, relative to the other weights.")
    teacher: float | None = Field(
        None,
        ge=0,
        le=1,
        description="In place of finetune.teacher: 1 for text that a model wrote, whose labels are draws; null: that.",
    )


class Finetune(Section):
    """Training of the whole compressed model after its layers were distilled; the factors stay factors."""

    dataset: str | None = Field(None, description="Data to train on, as for calibration; null: the calibration's own.")
    datasets: list[Lesson] | None = Field(
        None,
        min_length=1,
        description="Several data sets in place of one, a list of sections as calibration.datasets; needs tokens.",
    )
    generate: Generate | None = Field(
        None,
        description="Text that the original writes for training alone, mixed with the data by weight, be they those of "
        "this section or the calibration's. temperature: 1.2 teaches what is in no data; null: none.",
    )
    config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str | None = Field(None, description="Split; null: train, or the calibration's with its data set.")
    column: str | None = Field(None, description="Column of the text or transcript; null: found by its usual names.")
    hours: float | None = Field(None, gt=0, description="Hours of speech to use at most; null: all.")
    variants: int = Field(
        0, ge=0, description="Speech: further transcripts of every clip, as for calibration; for teacher: 1."
    )
    augment: int = Field(0, ge=0, description="Speech: altered copies of every clip, as for calibration.")
    tokens: int | None = Field(None, gt=0, description="Tokens of text to use at most; null: all.")
    sequence_length: int = Field(512, ge=2, description="Tokens per sequence of text.")
    special_tokens: Literal["auto", "text"] | None = Field(
        None, description="What stands at the start of every sequence, as for calibration; null: the calibration's own."
    )
    epochs: int = Field(1, ge=1, description="Passes over the data.")
    steps: int | None = Field(None, ge=1, description="Updates; null: as many as the epochs take.")
    batch_size: int = Field(8, ge=1, description="Clips or sequences per forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per update.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    vector_learning_rate: float | None = Field(
        None,
        gt=0,
        description="That of vectors alone (norms, biases), which are few and bear much larger steps; null: the same.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Learning rate after the warm-up; linear and cosine fall to 0."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the updates over which the learning rate rises.")
    clip_norm: float = Field(1.0, gt=0, description="Largest gradient norm.")
    teacher: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the loss that is the distance to the original's predictions (KL divergence); the rest "
        "is that to the labels. The original is in memory beside the student then.",
    )
    average: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Judge and keep the mean of the states after this share of the updates, not the last one: it has "
        "less noise, and unlearns less of what the data does not show; null: the state itself.",
    )
    anchor: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In the end go back by this share of the way to where training began: what the data shows loses a "
        "little, what it does not show suffers less; null: stay.",
    )
    lora: Lora | None = Field(None, description="Train adapters (LoRA, by peft) instead of the parameters themselves.")
    freeze: list[str] | None = Field(
        None, description="Globs of parameters that stay as they are; null: the encoder, where there is one."
    )
    holdout: float = Field(0.05, ge=0, lt=1, description="Share of the examples kept out to choose the best state.")
    checks: int = Field(4, ge=1, description="How often the held-out loss is measured and the state stored.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of the data.")

    def _complaints(self) -> list[tuple[str, str]]:
        """(what, hint) of keys that do not go together."""
        found: list[tuple[str, str]] = []
        if self.datasets is None:
            return found
        if self.dataset is not None:
            found.append(BOTH)
        found += [of_one(name, several=True) for name in OF_ONE if getattr(self, name, None) is not None]
        if self.tokens is None:
            found.append(NO_TOKENS)
        return found

    @property
    def has_data(self) -> bool:
        """Whether it names data, and does not take the calibration's."""
        return self.dataset is not None or self.datasets is not None

    @property
    def named_data(self) -> dict[str, str]:
        """The data that it names, by their keys in the recipe."""
        named = {} if self.dataset is None else {"finetune.dataset": self.dataset}
        return named | {f"finetune.datasets.{i}": one.dataset for i, one in enumerate(self.datasets or ())}

    def data(self, base: Calibration, written: str) -> Calibration:
        """What is trained on, as a calibration of its own, given the calibration of the recipe.

        `written` is the file of what `generate` has the original write, the last of the data sets then.
        """
        update: dict[str, Any] = {
            "fraction": 1.0,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "special_tokens": self.special_tokens or base.special_tokens,
            "seed": self.seed,
        }
        if self.has_data:
            update |= {"dataset": self.dataset, "datasets": self._parts, "generate": None, "filter": None, "rows": None}
            update |= {"config": self.config, "split": self.split or "train", "column": self.column}
        elif base.is_mixture:  # nothing but how much of it is read
            update |= {"tokens": self.tokens or base.tokens}
        elif base.dataset is not None:
            update |= {"config": self.config or base.config, "split": self.split or base.split}
            update |= {"column": self.column or base.column}
        found = base.model_copy(update=update)
        if self.generate is None:
            return found
        text = {"dataset": written, "split": self.generate.split, "weight": self.generate.weight}
        alone = {"dataset": None, "tokens": found.tokens or base.tokens}
        return found.model_copy(update={**alone, "datasets": [*found.parts, Data.model_validate(text)]})

    def written(self, base: Calibration) -> int:
        """How many tokens the original writes for training alone."""
        if self.generate is None:
            return 0
        data = self.data(base, "")
        return self.generate.tokens or with_spare(data.shares[len(data.parts) - 1])

    @property
    def _parts(self) -> list[Data] | None:
        """`datasets` as data of a calibration."""
        if self.datasets is None:
            return None
        return [Data.model_validate(one.model_dump(exclude={"teacher"}, exclude_unset=True)) for one in self.datasets]

    def taught_alone(self) -> Finetune:
        """The same, learning from the original's predictions alone, whatever the data."""
        datasets = self.datasets and [one.model_copy(update={"teacher": None}) for one in self.datasets]
        return self.model_copy(update={"teacher": 1.0, "datasets": datasets})

    @property
    def taught(self) -> bool:
        """Whether the original's predictions are learned from."""
        return self.teacher > 0 or any(one.teacher for one in self.datasets or ())

    def shares(self, data: Calibration) -> list[float]:
        """Of each source of `data`, what it is trained on, the share of the loss that the original's predictions have.

        The labels of what it wrote itself are draws from them, which add nothing but chance: where there is a teacher,
        it alone is learned from.
        """
        given = len(data.parts) - (self.generate is not None)
        shares = [self.teacher if one.teacher is None else one.teacher for one in self.datasets or ()]
        shares = shares or [self.teacher] * given
        return shares + [1.0 if self.taught else 0.0] * (len(data.weights) - given)

    def averaged_from(self, updates: int) -> int | None:
        """The first update, of so many, whose state counts in the mean; None: there is no mean."""
        return None if self.average is None else int(self.average * updates) + 1


class Quantize(Section):
    """The result in few bits: weights become whole numbers, with a scale for every group of them."""

    bits: Literal[4, 8, "auto"] = Field(
        8,
        description="Bits of a number: 8 loses next to nothing, 4 some; auto: 4 or 8 for every weight, whichever is "
        "worth its bytes (with compress.size).",
    )
    group_size: Literal[32, 64, 128] = Field(
        32, description="Numbers that share a scale (16 bits), along the dimension that products sum over."
    )
    what: Literal["factors", "linears", "all"] = Field(
        "linears",
        description="factors: the weights of low rank alone; linears: those that stayed dense as well; all: the "
        "embedding and the head, too.",
    )
    embedding: Literal[4, 8] = Field(8, description="what: all: bits of the embedding and the head.")
    method: Literal["compensated", "nearest"] = Field(
        "compensated",
        description="compensated: what one number loses is made up for by others, measured on the calibration data; "
        "nearest: every number for itself, without data.",
    )
    storage: Literal["auto", "keep"] = Field(
        "auto",
        description="The form that a weight of low rank is kept in: auto: the one that loses least for its bytes, "
        "pivot rows, two factors, or all numbers (compensated); keep: that of compress.storage. With compress.size, no "
        "form takes more bytes than there are.",
    )
    tokens: int = Field(8192, ge=1, description="compensated: calibration tokens that rounding is fitted on.")
    steps: int = Field(
        0,
        ge=0,
        description="Updates after rounding, in which scales, norms and biases learn from the original's predictions, "
        "on the data of finetune (without one, the calibration's); 0: none.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of these updates.")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a weight may get."""
        return (4, 8) if self.bits == "auto" else (self.bits,)

    @property
    def fitted(self) -> bool:
        """Whether data are read to round by."""
        return self.method == "compensated"
