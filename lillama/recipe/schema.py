"""The recipe: the YAML file that fixes a run. Every field has a type, a default and a description.

The descriptions become docs/recipe.md and the JSON schema that editors read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from lillama.errors import LillamaError
from lillama.recipe import yamlfile
from lillama.recipe.afterwards import Finetune as Finetune
from lillama.recipe.afterwards import Lora as Lora
from lillama.recipe.afterwards import Quantize as Quantize
from lillama.recipe.calibration import Calibration as Calibration
from lillama.recipe.calibration import Data as Data
from lillama.recipe.calibration import Generate as Generate
from lillama.recipe.explain import Origin, check_names, explained, together
from lillama.recipe.overrides import apply_override, noted, plain_copy
from lillama.recipe.section import Section as Section
from lillama.recipe.sizes import check_sizes


class Model(Section):
    """The pretrained model to compress."""

    id: str = Field(description="Hub id, local directory, or package:NAME for an installed package that ships weights.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights that are evaluated and saved; auto: as the checkpoint says."
    )
    gguf_file: str | None = Field(None, description="Name of the GGUF file to read, where the model is one.")
    trust_remote_code: bool = Field(False, description="Run modelling code that comes with the model.")


class Compress(Section):
    """What becomes low-rank, and how small."""

    reduction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the parameters to remove, between 0 and 1. Either this or size is given.",
    )
    size: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In place of reduction: share of the original's bytes that the result may take, in the type that "
        "model.dtype says of both. With quantize, ranks and bits share this one budget (fisher).",
    )
    of: Literal["weights", "model"] = Field(
        "model",
        description="What the share is of: model (all parameters) or weights (the matrices the plugin offers).",
    )
    strategy: str = Field(
        "fisher",
        description="How ranks are chosen: bottom (Algorithm 1), top, uniform, fisher (where the predictions suffer "
        "least, measured when the run begins), or a plugin's.",
    )
    min_rank: int = Field(1024, ge=1, description="Smallest rank of bottom and top: k of Algorithm 1.")
    rank_step: int = Field(256, ge=1, description="Distance between the ranks bottom and top try: m of Algorithm 1.")
    rank_multiple: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        8,
        description="Ranks are multiples of this (uniform, fisher). auto: 64, which the tiles of a GPU's products "
        "want, where the model is 2048 wide or wider; otherwise 8.",
    )
    keep_dense_below: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="A weight whose factors would save less than this share of its numbers, and so hardly any time, "
        "stays dense, and others make up for it; 0: any saving will do. With neurons, 0.99 keeps all weights dense, so "
        "that neurons alone go.",
    )
    init: str = Field(
        "fisher",
        description="Starting factors: svd, random, asvd (svd that weighs columns by their inputs' sizes), whitened "
        "(best for the calibration inputs), compensated (for the student's inputs, making up for earlier losses), "
        "fisher (best for the predictions on the calibration data), or a plugin's.",
    )
    storage: str = Field(
        "pivoted",
        description="How rank r is kept: factors (two of them), pivoted (pivot rows and coefficients, r^2 numbers "
        "fewer), or a plugin's.",
    )
    neurons: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest share of the neurons of an MLP that may be removed, in one budget with the ranks "
        "(fisher): rows of its first matrices and columns of its last, which costs no second product. For models whose "
        "plugin names their MLPs, or of which tracing finds them. null: none.",
    )
    gram_tokens: int = Field(
        65536, ge=1, description="Calibration tokens that input statistics are taken over (whitened)."
    )
    fisher_tokens: int = Field(
        32768, ge=1, description="Calibration tokens that the predictions' sensitivity is measured on (fisher)."
    )
    fisher_inputs: int | None = Field(
        None,
        ge=1,
        description="Calibration tokens behind those, of which only what enters each weight is measured, in a third of "
        "the time (fisher). For text; leave them out where much of the input is silence that nobody reads. "
        "null: none.",
    )
    embedding: bool = Field(
        False,
        description="Whether the token embedding and the output head are compressed too, where the plugin lists the "
        "blocks alone: for models with a large vocabulary. One pair of factors is both where they are tied.",
    )
    embedding_floor: float = Field(
        0.1,
        ge=0,
        description="Embeddings: every token of the vocabulary counts for at least this share of the mean token's "
        "count, so that those which the calibration text lacks keep their meaning.",
    )
    skip: list[str] = Field(default_factory=list, description="Globs of weights that stay dense.")


class Distill(Section):
    """How each student layer learns from its own original."""

    loss: str = Field("student", description="Inputs the student learns on: teacher, student, teacher+student.")
    objective: str = Field("normalised_mse", description="Distance of outputs: l1_logcos (eq. 7), mse, normalised_mse.")
    schedule: str = Field(
        "sequential",
        description="concurrent: all layers in one pass over the data; sequential: one by one, inputs cached; "
        "or a plugin's.",
    )
    train: Literal["factors", "layer"] = Field(
        "layer", description="What learns: the factors alone, or every parameter of a layer that has factors."
    )
    epochs: int = Field(1, ge=0, description="Passes over the calibration data; 0 keeps the initial factors.")
    batch_size: int = Field(8, ge=1, description="Sequences per step.")
    learning_rate: float = Field(8.6e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    clip_norm: float | None = Field(1.0, gt=0, description="Largest gradient norm of a layer; null: no limit.")
    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of the batches kept out of training to choose the best state."
    )
    checks: int = Field(4, ge=1, description="How often the held-out loss is measured while a layer trains.")


class Run(Section):
    """Where and how the run happens."""

    out: str = Field(description="Run directory: everything the run leaves.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initialisation and of the order of batches.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the matrix products while distilling; auto: bfloat16 where the hardware has it. "
        "Weights, sums and losses stay float32.",
    )
    stream_memory: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="GiB of host memory for the activations that flow between layers (sequential schedule); where they "
        "need more they go to files in the run directory. auto: a quarter of what is free.",
    )
    stream_device_memory: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description="The same for the memory of the GPU, which is used first. auto: a quarter of what is free."
    )
    low_memory: bool = Field(
        False,
        description="A lower peak for more time: freed memory goes back to the system at once, best states are kept in "
        "files, and in the concurrent schedule one original layer is on the device at a time (others wait in host "
        "memory; on a CPU, on disk).",
    )
    divide: bool | None = Field(
        None,
        description="Whether each of several processes keeps a part of the blocks while the model learns as a whole "
        "(finetune), for models that do not fit one card; null: where accelerate launch --use_fsdp asks for it.",
    )
    curve: int = Field(
        0,
        ge=0,
        description="Points of a curve of the whole model's perplexity while it is distilled, on the text of the first "
        "perplexity evaluator, else on held-out calibration data; 0: none.",
    )
    curve_tokens: int = Field(4096, ge=2, description="Tokens of text for each of these points.")
    track: list[Literal["wandb", "trackio"]] = Field(
        default_factory=list,
        description="Where to send losses and metrics while the run goes on; events.jsonl has them always.",
    )
    snapshot_seconds: float = Field(
        300.0, ge=0, description="Concurrent schedule: how often the state is stored for a later resume."
    )


RUN_OUT = "{run.out}"  # in the `dataset` of an evaluator: the run directory, for what a run itself writes


def placed(evaluators: dict[str, dict[str, Any]], recipe: Any) -> dict[str, dict[str, Any]]:
    """The evaluators' options with the run directory in the place of `{run.out}`."""
    out = getattr(recipe.run, "out", None)
    found = {key: dict(options) for key, options in evaluators.items()}
    for options in found.values():
        if out is not None and isinstance(dataset := options.get("dataset"), str):
            options["dataset"] = dataset.replace(RUN_OUT, out)
    return found


class Readable(Section):
    """What is read from a file or a mapping, with `--set`s, and checked whole."""

    @field_validator(
        "model", "compress", "distill", "calibration", "evaluate", "run", mode="before", check_fields=False
    )
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        # A heading with nothing (or only comments) below it means the defaults.
        return {} if value is None else value

    @field_validator("evaluate", mode="before", check_fields=False)
    @classmethod
    def _empty_options(cls, value: Any) -> Any:
        # `speed:` with nothing after it means the defaults; `speed: false` is a mistake.
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    _written: str = PrivateAttr("")

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read, override and validate a recipe file.

        `overrides` are `dotted.key=value` texts whose values are read as YAML. Raises LillamaError with
        file, line and key for anything that does not fit, and names the nearest valid key.
        """
        document = yamlfile.load(path)
        return cls._validated(document.data, overrides, document)

    @classmethod
    def parse(cls, data: Mapping[str, Any] | str, overrides: Iterable[str] = ()) -> Self:
        """The same from a mapping (paths and tuples are welcome in it) or a YAML text."""
        document = yamlfile.Document(data if isinstance(data, str) else "", "recipe")
        return cls._validated(document.data if isinstance(data, str) else data, overrides, document)

    @classmethod
    def _validated(cls, data: Any, overrides: Iterable[str], document: yamlfile.Document) -> Self:
        if not isinstance(data, Mapping):
            what = "the recipe is empty" if data is None else "a recipe is a mapping of keys to values"
            raise LillamaError(what, where=document.name, hint="`lillama recipes` shows examples.")
        data, origin = plain_copy(data), Origin(document)
        overrides = [*overrides]
        for override in overrides:
            origin.overrides[apply_override(data, override)] = f"--set {override}"
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise together(explained(error, (), origin, cls, cls)) from error
        check_sizes(recipe, origin)
        recipe = recipe.model_copy(update={"evaluate": placed(check_names(recipe, origin), recipe)})
        recipe._written = document.text and noted(overrides) + document.text
        return recipe

    @property
    def written(self) -> str:
        """The text the recipe was read from, overrides as comments above it; empty when it came from Python."""
        return self._written

    def __eq__(self, other: object) -> bool:
        # The text it was written in does not make it another recipe.
        return isinstance(other, type(self)) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # evaluators' options are mappings

    def to_yaml(self) -> str:
        """The recipe with every default of its sections written out; loads back as an equal one."""
        return yamlfile.dump(self.model_dump(mode="json"))


class Recipe(Readable):
    """A run, complete. Read one with `Recipe.load`."""

    version: Literal[1] = Field(1, description="Version of this format.")
    model: Model = Field(description="The pretrained model to compress.")
    plugin: str = Field("auto", description="Architecture plugin by name; auto: the one that knows the model.")
    compress: Compress = Field(description="What becomes low-rank, and how small.")
    distill: Distill = Field(
        default_factory=lambda: Distill.model_validate({}), description="How each student layer learns."
    )
    calibration: Calibration = Field(description="The data that layers are distilled on.")
    finetune: Finetune | None = Field(
        None, description="Training of the whole compressed model afterwards; null: none."
    )
    quantize: Quantize | None = Field(None, description="The result in few bits, as the last step; null: in full.")
    evaluate: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Evaluators by name, each with its options. NAME/LABEL runs one several times, and its metrics are "
        "called LABEL/METRIC: perplexity/wiki gives wiki/perplexity.",
    )
    run: Run = Field(description="Where and how the run happens.")

    @property
    def learned_generate(self) -> Generate | None:
        """How the model writes text for training alone, where it does."""
        return None if self.finetune is None else self.finetune.generate

    @property
    def learned_written(self) -> int:
        """How many tokens it writes for training alone."""
        return 0 if self.finetune is None else self.finetune.written(self.calibration)
