"""The section of a recipe that says what layers are distilled on: a data set, several, or text the model writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lillama.errors import LillamaError
from lillama.recipe.section import Section

WRITTEN = 65536  # tokens that a model writes where nothing says how many
SPARE = 8  # of a share one in so many is written besides
OF_ONE = ("config", "split", "column", "filter", "rows")  # what belongs to the one data set of `dataset`
# What (what, hint) is said of a mixture, of whichever section.
BOTH = ("both dataset and datasets are given", "Put the one into the list, or leave the list out.")
NO_TOKENS = ("a mixture needs tokens: weights are shares of them", "For example tokens: 65536.")


Temperature = Annotated[float, Field(gt=0)]
Beginning = Literal["user", "start", "openings"]
BEGINNINGS: tuple[Beginning, ...] = ("user", "start", "openings")


class OneDataSet(Section):
    """Which rows of which data set."""

    dataset: str | None
    config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split, slices allowed: train[:80%].")
    column: str | None = Field(None, description="Column of the text; null: found by its usual names.")
    filter: dict[str, str | int | list[str | int]] | None = Field(
        None, description="Rows to keep: a column's value, or a list of values. {language: hau}, for example."
    )
    rows: int | None = Field(None, gt=0, description="How many rows (lines of a .txt file) to use at most; null: all.")


class Data(OneDataSet):
    """One data set of a mixture, with its share of the tokens."""

    dataset: str = Field(description="As calibration.dataset.")
    weight: float = Field(1.0, gt=0, description="Its share of calibration.tokens, relative to the other weights.")


class Generate(Section):
    """Text that the original writes itself, sampled from its predictions; it is kept in the run directory."""

    tokens: int | None = Field(
        None,
        gt=0,
        description="How many tokens are written; null: those of calibration.tokens that are its share and an eighth "
        "more, since text that is read back may have fewer; 65536 where there is nothing else and calibration.tokens "
        "is null.",
    )
    length: int = Field(512, ge=2, description="Tokens of every text; at most the model's positions.")
    batch: int = Field(32, ge=1, description="Texts that are written at once.")
    temperature: Temperature | Annotated[list[Temperature], Field(min_length=1)] = Field(
        1.0,
        description="The predictions are divided by this; 1: as they are. A list: texts take them in turn.",
    )
    begin: list[Beginning] = Field(
        default_factory=lambda: list(BEGINNINGS),
        description="How texts begin, of each kind as many: user (as the chat template begins a user's turn, where "
        "there is a template), start (with the token that any text begins with), openings (with first words of texts "
        "of many kinds, in English: code, manuals, science, news, letters; leave them out for a model of one other "
        "language).",
    )
    prompts: str | None = Field(
        None,
        description="Data to begin texts with, as another kind: lines of a .txt file, or rows of any other data.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the sampling.")
    split: str = Field(
        "train",
        description="Which of the texts to use: train[:90%] leaves a tenth for an evaluator, whose dataset is "
        "'{run.out}/calibration/own.jsonl' and whose split is train[90%:].",
    )
    weight: float = Field(1.0, gt=0, description="Its share of the tokens, relative to the data sets' weights.")

    def _complaints(self) -> list[tuple[str, str]]:
        if self.begin or self.prompts:
            return []
        return [("generate begins its texts with nothing", "Give begin: [user, start], or prompts.")]


class Calibration(OneDataSet):
    """The data that layers are distilled on."""

    dataset: str | None = Field(
        None,
        description="Hub id, a .txt/.jsonl/.json/.parquet/.csv file, a folder of such files, "
        "or package:MODULE for texts in a module of Python; null: datasets, or text that the model writes.",
    )
    datasets: list[Data] | None = Field(
        None,
        min_length=1,
        description="Several data sets in place of one, a list of sections. Each gives its share of tokens, in "
        "sequences of its own, which are then shuffled by seed; one that has too little is refused.",
    )
    generate: Generate | None = Field(
        None,
        description="Text that the model writes itself, alone or mixed with the data ({}: with its defaults); "
        "null: none.",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the rows to use.")
    tokens: int | None = Field(
        None,
        gt=0,
        description="How many tokens to use at most; null: all. A mixture has exactly so many, in whole sequences.",
    )
    sequence_length: int = Field(512, ge=2, description="Tokens per sequence; rows are joined and cut to this.")
    special_tokens: Literal["auto", "text"] = Field(
        "auto",
        description="auto: around every sequence stand the special tokens that the tokenizer puts around a text (BOS; "
        "[CLS] ... [SEP]), and count towards its length; text: sequences are cut from the text as it runs.",
    )
    variants: int = Field(
        0,
        ge=0,
        description="Speech: further transcripts of every clip, sampled from the original at rising temperatures. They "
        "show the decoder more words where there is little data.",
    )
    augment: int = Field(
        0,
        ge=0,
        description="Speech: altered copies of every clip (parts of it, another speed, noise), which the original "
        "transcribes.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of rows.")

    def _complaints(self) -> list[tuple[str, str]]:
        """(what, hint) of keys that do not go together."""
        found = []
        if self.dataset is None and self.datasets is None and self.generate is None:
            found.append(("there is no data: the key 'calibration.dataset' is missing", NO_DATA))
        if self.dataset is not None and self.datasets is not None:
            found.append(BOTH)
        if self.dataset is None:
            fields = type(self).model_fields
            for name in (name for name in OF_ONE if getattr(self, name) != fields[name].default):
                found.append(of_one(name, bool(self.datasets)))
        if self.is_mixture and self.tokens is None:
            found.append(NO_TOKENS)
        return found or self._shares_complaints()

    def _shares_complaints(self) -> list[tuple[str, str]]:
        """The same of shares that cannot be had."""
        if not self.is_mixture or self.tokens is None or self.tokens < self.sequence_length:
            return []
        shares = self.shares
        if not all(shares):
            what = f"a weight is too small: its share of {self.tokens} tokens is less than a sequence"
            return [(what, f"Raise it, or tokens, or lower sequence_length, {self.sequence_length}.")]
        if self.generate is not None and self.written < shares[-1]:
            what = f"generate.tokens, {self.written}, are fewer than the {shares[-1]} of tokens that are its share"
            return [(what, "Leave generate.tokens out, raise it, or lower generate.weight.")]
        return []

    @property
    def parts(self) -> list[Data]:
        """The data sets, with their weights; what the model writes is none of them."""
        if self.dataset is None:
            return list(self.datasets or ())
        return [Data.model_validate({"dataset": self.dataset, **{name: getattr(self, name) for name in OF_ONE}})]

    @property
    def is_mixture(self) -> bool:
        """Whether there is more than one source of text, or one in the form of a list."""
        return self.datasets is not None or (self.dataset is not None and self.generate is not None)

    @property
    def weights(self) -> list[float]:
        """The weights of `parts` and, last, of what the model writes."""
        return [part.weight for part in self.parts] + ([self.generate.weight] if self.generate else [])

    @property
    def written(self) -> int:
        """How many tokens the model writes itself."""
        section = self.generate
        if section is None:
            return 0
        if section.tokens is not None or self.tokens is None:
            return section.tokens or WRITTEN
        return with_spare(self.shares[-1] if self.is_mixture else self.tokens)

    @property
    def known_tokens(self) -> int | None:
        """How many tokens there will be at most, where that can be known before anything is read."""
        return self.written if self.tokens is None and self.generate is not None else self.tokens

    @property
    def shares(self) -> list[int]:
        """The tokens of every source of a mixture, as in `weights`: those of whole sequences."""
        length = self.sequence_length
        return [length * count for count in _shared((self.tokens or 0) // length, self.weights)]

    def one_dataset(self) -> str:
        """The data set, for what reads no mixture and no text of the model's. Raises LillamaError without one."""
        if self.dataset is None or self.generate is not None:
            raise LillamaError(
                "this kind of model is calibrated on one data set",
                where="calibration.dataset",
                hint="Give dataset, and neither datasets nor generate.",
            )
        return self.dataset


NO_DATA = "Give dataset, datasets: [{dataset: ...}, ...], or generate: {} to have the model write its own text."


def of_one(name: str, several: bool) -> tuple[str, str]:
    """What (what, hint) is said of a key of one data set where there are `several`, or text that the model writes."""
    if several:
        hint = f"Give it to each of datasets that wants it: {{dataset: ..., {name}: ...}}."
        return f"{name} belongs to a dataset, and datasets is given", hint
    hint = "generate has a split of its own; the other keys are of data sets."
    return f"{name} belongs to a dataset, and generate is given", hint


def with_spare(tokens: int) -> int:
    """How many tokens are written where so many are read: read back, a text may have fewer."""
    return tokens + -(-tokens // SPARE)


def _shared(count: int, weights: list[float]) -> list[int]:
    """`count` things shared out by weights: rounded down, the rest to the largest remainders, earlier ones first."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    whole = [int(one) for one in exact]
    order = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole)]:
        whole[i] += 1
    return whole
