"""What of a recipe cannot be, seen from the model and this machine: told before anything is written."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from lillama.base.rundir import OWN_TEXT
from lillama.contract import Layer
from lillama.data.files import missing
from lillama.data.text import wanted_tokens
from lillama.errors import LillamaError, did_you_mean
from lillama.factorise.start import find_needs
from lillama.plan.plan import Plan, wants_spectra
from lillama.pretrained.source import Source
from lillama.recipe.calibration import NO_TOKENS
from lillama.recipe.schema import Calibration, Finetune, Generate, Recipe
from lillama.registry import EVALUATORS, INITIALISERS
from lillama.signature import parameters

# What configurations call the number of positions; later names are those of models that lack the first.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


def positions(config: Any) -> int | None:
    """How many positions a model of this configuration has, where that is limited."""
    text = config.get_text_config()
    found = next((value for name in POSITIONS if (value := getattr(text, name, None))), None)
    return found if isinstance(found, int) and found > 0 else None


def check_lengths(recipe: Recipe, config: Any) -> None:
    """LillamaError for sequences of text that are longer than the model's positions.

    Of evaluators, those that are written in the recipe: left out, such an option is the model's positions at most.
    """
    most = None if config.is_encoder_decoder else positions(config)
    if most is None:
        return
    for where, length in _lengths(recipe):
        if length > most:
            raise LillamaError(
                f"sequences of {length} tokens are longer than the {most} positions of the model",
                where=where,
                hint=f"Give {most} or less.",
            )


def _lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    sections: list[tuple[str, Calibration | Generate | Finetune | None]] = [
        ("calibration", recipe.calibration),
        ("calibration.generate", recipe.calibration.generate),
        ("finetune", recipe.finetune),
        ("finetune.generate", recipe.learned_generate),
    ]
    for name, section in sections:
        # Nobody chose the default: it stands in the recipe of a model with fewer positions whose batches are given.
        key = "length" if isinstance(section, Generate) else "sequence_length"
        if section and getattr(section, key) != type(section).model_fields[key].default:
            yield f"{name}.{key}", getattr(section, key)
    for key, options in recipe.evaluate.items():
        if isinstance(length := options.get("sequence_length"), int):
            yield f"evaluate.{key}.sequence_length", length


def check_writer(recipe: Recipe, source: Source) -> None:
    """LillamaError for a model that is to write its own text and does not continue text."""
    if recipe.calibration.generate is None and recipe.learned_generate is None:
        return
    if source.auto_class is not AutoModelForCausalLM or source.config.is_encoder_decoder:
        raise LillamaError(
            f"{type(source.model).__name__} does not continue text, so it cannot write its own",
            where="finetune.generate" if recipe.calibration.generate is None else "calibration.generate",
            hint="Give data: calibration.dataset, or --data of `lillama compress`.",
        )


def check_learned_text(recipe: Recipe) -> None:
    """LillamaError where what the model is to write for training alone cannot be mixed with the rest."""
    section, generate = recipe.finetune, recipe.learned_generate
    if section is None or generate is None:
        return
    data = section.data(recipe.calibration, "")
    if data.tokens is None:
        raise LillamaError(NO_TOKENS[0], where="finetune.tokens", hint=NO_TOKENS[1])
    share = wanted_tokens(data, "finetune")[len(data.parts) - 1] or 0
    if recipe.learned_written < share:
        what = f"{generate.tokens} are fewer than the {share} of finetune.tokens that are its share"
        hint = "Leave it out, raise it, or lower finetune.generate.weight."
        raise LillamaError(what, where="finetune.generate.tokens", hint=hint)


def check_skip(globs: Sequence[str], layers: Sequence[Layer], model: Any) -> None:
    """LillamaError for a glob under compress.skip that nothing in the model is called; what is dense may be named."""
    weights = {weight.name for layer in layers for weight in layer.weights}
    names = weights | {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for glob in globs:
        if fnmatch.filter(names, glob):
            continue
        # Weights are known by their last names: model.layers.0.mlp.down_proj by down_proj.
        lasts = {name.rpartition(".")[2] for name in weights}
        hint = did_you_mean(glob.strip("*.?").rpartition(".")[2], lasts)
        ends = f"A glob stands for whole names: '*{glob}' for all that end so. " if _ends(glob, names) else ""
        raise LillamaError(f"no weight is called '{glob}'", where="compress.skip", hint=f"{ends}{hint}")


def _ends(glob: str, names: set[str]) -> bool:
    return bool(fnmatch.filter(names, f"*{glob}"))


def check_initialiser(recipe: Recipe, plan: Plan) -> None:
    """LillamaError for an initialiser that some planned weight has nothing to give."""
    init = recipe.compress.init
    asked = parameters(INITIALISERS.get(init))
    grams = {parameter.name: parameter.default for parameter in asked if parameter.name in ("gram", "output_gram")}
    if len(grams) == 2 and any(default is inspect.Parameter.empty for default in grams.values()):
        raise LillamaError(
            f"the initialiser '{init}' wants both gram and output_gram, and every weight has one of them",
            where="compress.init",
            hint="Give both parameters the default None: the one that costs less is measured.",
        )
    tables = [name for name in plan.ranks if plan.weights[name].kind == "embedding"]
    if tables and "gram" in grams and len(grams) == 1:
        raise LillamaError(
            f"the initialiser '{init}' wants the Gram of a weight's inputs, and '{tables[0]}', an embedding, has none",
            where="compress.init",
            hint="One that names output_gram serves, such as whitened; or list the embedding under compress.skip.",
        )


def check_neurons(recipe: Recipe, layers: Sequence[Layer]) -> None:
    """LillamaError where `compress.neurons` could remove none, or nothing would know which."""
    compress, where = recipe.compress, "compress.neurons"
    if compress.neurons is None:
        return
    if compress.size is not None:
        hint = "Give compress.reduction in place of size, or leave neurons out."
        raise LillamaError("neurons are removed for a number of parameters, not of bytes", where=where, hint=hint)
    if not wants_spectra(compress):
        hint = "Use compress.strategy: fisher, or leave neurons out."
        raise LillamaError(f"strategy {compress.strategy} measures nothing that says which", where=where, hint=hint)
    needs = find_needs(recipe)
    if needs.grams or not needs.fisher:
        hint = "Use compress.init: fisher, or leave neurons out."
        said = f"init {compress.init} starts from what is known of all neurons"
        raise LillamaError(said, where=where, hint=hint)
    if not any(layer.neurons for layer in layers):
        hint = "Leave neurons out. A plugin names them: Layer.of_linears(..., neurons=...)."
        raise LillamaError("no MLP of this model is known whose neurons could go", where=where, hint=hint)


def check_data(recipe: Recipe) -> None:
    """LillamaError for a local file or folder that is needed late in a run and that does not exist."""
    calibration, own = recipe.calibration, Path(recipe.run.out) / OWN_TEXT
    needed = [(f"evaluate.{key}.{option}", value) for key, option, value in _data_options(recipe)]
    if calibration.generate is not None:
        needed = [(where, value) for where, value in needed if Path(value) != own]  # which is still to be written
        if calibration.generate.prompts is not None:
            needed.append(("calibration.generate.prompts", calibration.generate.prompts))
    if recipe.learned_generate is not None and recipe.learned_generate.prompts is not None:
        needed.append(("finetune.generate.prompts", recipe.learned_generate.prompts))
    if recipe.finetune is not None:
        needed = [*recipe.finetune.named_data.items(), *needed]
    for where, value in needed:
        if (path := missing(value)) is not None:
            raise LillamaError(f"there is no file '{path}'", where=where, hint="Check the path.")


def _data_options(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(evaluator, option, text) of all options that name data: `dataset`, and those described by a file or folder."""
    for key, given in recipe.evaluate.items():
        fields = EVALUATORS.options(key.partition("/")[0]).model_fields
        for option, value in given.items():
            said = (fields[option].description or "").lower()
            if option == "dataset" or "file" in said or "folder" in said:
                for text in _texts(value):
                    yield key, option, text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)
