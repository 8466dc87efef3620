"""Training of a compressed model as a whole in a run: what it learns from, and whose predictions it is taught by."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from lillama import host
from lillama.base import ranks
from lillama.base.progress import Progress
from lillama.base.rundir import ORIGINAL, RunDirectory
from lillama.errors import LillamaError
from lillama.finetune import data
from lillama.finetune import train as finetune
from lillama.finetune.data import Examples
from lillama.finetune.trainer import Setting
from lillama.lowrank import swap
from lillama.pretrained.locate import read_tokenizer
from lillama.recipe.schema import Finetune, Quantize, Recipe
from lillama.report import track
from lillama.run.owntext import OwnText
from lillama.run.prepare import Prepared


def learn(
    prepared: Prepared,
    model: Any,
    section: Finetune,
    directory: RunDirectory,
    progress: Progress,
    texts: Path | None = None,
) -> None:
    """Train `model` (float32, on the CPU) in place as `section` says; goes on where it was stopped.

    What the original writes to learn from is shared with other runs in `texts`, where that is given. Raises
    LillamaError where there is nothing to learn from.
    """
    with progress.timed("read data"):
        examples = _examples(prepared, section, directory, progress, texts)
    recipe, source, teacher = prepared.recipe, prepared.source, None
    if section.taught:
        teacher = source.auto_class.from_pretrained(
            source.directory,
            config=copy.deepcopy(source.config),
            dtype=source.working,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    trackers = (tuple(recipe.run.track), track.name(recipe))
    blocks = None
    if divides(recipe):  # a norm that is passed through has no weights; it may run behind the blocks, with the head
        blocks = tuple(layer.name for layer in prepared.layers if layer.kind == "block" and layer.weights)
    setting = Setting(section, prepared.device, directory, progress, *trackers, blocks)
    finetune.finetune(model, teacher, examples, setting)


def divides(recipe: Recipe) -> bool:
    """Whether each process has a part of a model that learns as a whole (FSDP), and not all of it."""
    asked = ranks.asked_to_divide() if recipe.run.divide is None else recipe.run.divide
    return asked and ranks.world() > 1


def _examples(
    prepared: Prepared, section: Finetune, directory: RunDirectory, progress: Progress, texts: Path | None
) -> Examples:
    recipe, source = prepared.recipe, prepared.source
    # Of `section`, which the recipe need not have.
    asked = recipe.model_copy(update={"finetune": section})
    found = host.get().finetune_data(prepared.plugin, source.model, asked, progress)
    if found is not None:
        return list(found)
    if source.config.is_encoder_decoder:
        raise LillamaError(
            f"the plugin {prepared.plugin} provides no data to train this model on",
            where="finetune" if recipe.finetune is not None else "quantize.steps",
            hint="Its hook finetune_data would; without finetune and quantize.steps nothing is trained.",
        )
    tokenizer = read_tokenizer(recipe.model, source.where, source.gguf, directory.path / ORIGINAL)

    def written(of: Literal["calibration", "finetune"]) -> Path:
        return ranks.by_first(OwnText(prepared, directory.path, progress, texts, of).path)

    return data.text_examples(tokenizer, recipe, section, written)


def around_rounding(model: Any, recipe: Recipe, section: Quantize) -> Finetune:
    """How a model in few bits learns: its codes stay; scales, norms and biases follow the original's predictions.

    Data, batches and their order are those of the recipe's fine-tuning, where it has one.
    """
    scales = {f"{name}.{leaf}" for name, module in swap.factor_modules(model) for leaf in module.narrow()}
    others = [name for name, p in model.named_parameters() if name not in scales and p.dim() > 1]
    base = recipe.finetune or Finetune.model_validate({"batch_size": 1})
    learning = {"steps": section.steps, "learning_rate": section.learning_rate, "lr_schedule": "cosine"}
    return base.taught_alone().model_copy(update={**learning, "lora": None, "weight_decay": 0.0, "freeze": others})
