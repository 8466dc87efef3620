"""LoRA adapters while fine-tuning, by peft: on the factors, on the linears that stayed dense, or on both.

peft's adapters on bare parameters serve the factors: A (d_out x r) becomes A + s X Y, B likewise. They are merged
before anything is saved, so that the result is a checkpoint like any other.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lillama.errors import LillamaError
from lillama.lowrank.linear import LowRankLinear
from lillama.recipe.schema import Lora

# peft asks transformers for something by its old name.
OLD_NAME = "`is_gradient_checkpointing` is deprecated"

UNTIED = "Input and output embeddings are no longer tied after merging"


def attach(model: Any, section: Lora) -> Any:
    """Wrap `model` in adapters on the parameters that may learn; returns peft's model, where they alone learn.

    What is frozen gets none, nor do embeddings and the head. Raises LillamaError where peft is not installed or nothing
    is left to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise LillamaError(
            "peft is not installed", where="finetune.lora", hint="Install it: pip install 'lillama[lora]'."
        ) from error
    parameters, linears = targets(model, section.on)
    if not parameters and not linears:
        raise LillamaError(
            f"nothing that may learn can be adapted: {section.on}",
            where="finetune.lora.on",
            hint="Set it to all, or freeze less (finetune.freeze).",
        )
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.rank if section.alpha is None else section.alpha,
        target_modules=linears,
        target_parameters=parameters or None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OLD_NAME, category=FutureWarning)
        return get_peft_model(model, config)


def targets(model: Any, on: str) -> tuple[list[str], list[str]]:
    """(factors, dense linears) of `model` by name that `on` chooses and that are not frozen."""
    head = model.get_output_embeddings()
    parameters, linears = [], []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, LowRankLinear) and on in ("factors", "all"):
            names = module.storage.parameters
            parameters += [f"{name}.{factor}" for factor in names if getattr(module, factor).requires_grad]
        elif type(module) is nn.Linear and on in ("dense", "all") and module.weight.requires_grad:
            linears.append(name)
    return parameters, linears


def merge(adapted: Any) -> Any:
    """The model itself again, what its adapters learned added to its weights."""
    model = adapted.get_base_model()
    tied = model.config.tie_word_embeddings
    with warnings.catch_warnings():
        # Of two modules that share factors each computes a matrix of its own, which peft takes for untied ones.
        warnings.filterwarnings("ignore", message=UNTIED, category=UserWarning)
        merged = adapted.merge_and_unload()
    merged.config.tie_word_embeddings = tied
    return merged
