"""The recipe that `lillama compress MODEL` stands for: what did best, for a model of its size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama.base.rundir import OWN_TEXT
from lillama.contract import Layer
from lillama.recipe.schema import RUN_OUT

# A model as small as this learns more as a whole than layer by layer; a larger one has no room for that
# (docs/results/quality.md).
LEARNS_WHOLE = 1_000_000_000
NEURONS = 0.5  # the largest share of an MLP's neurons that may go (docs/results/quality.md)
MOST_UPDATES = 480  # the text once, as long as it is shorter than this
SEQUENCES, LENGTH = 4, 128  # of an update: short ones, from many places (docs/results/quality.md)
HELD_OUT = 0.1  # of the text, to measure on
MOSTLY_TABLE = 1 / 3  # of the parameters: then the blocks alone would have to give too much (docs/results/gemma.md)


@dataclass(frozen=True)
class Asked:
    """What the command line says: the model, the share to remove, the data, and where everything goes.

    Without `data` the model writes its own text.
    """

    model: str
    reduction: float
    data: str | None
    out: str
    tokens: int


def recipe_of(asked: Asked, parameters: int, embedding: bool = False, neurons: bool = False) -> dict[str, Any]:
    """The settings of a recipe for a model of so many parameters; what they leave out has its default.

    `embedding`: its table is in the budget; `neurons`: those of MLPs are.
    """
    calibrated = round(100 * (1 - HELD_OUT))
    tokens = int(asked.tokens * (1 - HELD_OUT))
    text = asked.data or f"{RUN_OUT}/{OWN_TEXT}"
    settings: dict[str, Any] = {
        "model": {"id": asked.model},
        # Inputs of all the rest of the text, as much as there is, join what is measured with gradients.
        "compress": {"reduction": asked.reduction, "embedding": embedding, "fisher_inputs": tokens},
        "calibration": {**_data(asked, f"train[:{calibrated}%]"), "tokens": tokens},
        "evaluate": {
            "perplexity": {
                "dataset": text,
                "split": f"train[{calibrated}%:]",
                "tokens": 8192,
            },
            "speed": {},
            "sample": {"prompt": "The most important thing about the sea is", "new_tokens": 40},
        },
        "run": {"out": asked.out},
    }
    if neurons:
        settings["compress"]["neurons"] = NEURONS
    if parameters <= LEARNS_WHOLE:
        settings["distill"] = {"epochs": 0, "batch_size": 2}
        settings["finetune"] = {
            "teacher": 1.0,
            "steps": max(10, min(MOST_UPDATES, tokens // (SEQUENCES * LENGTH))),
            "sequence_length": LENGTH,
            "batch_size": SEQUENCES,
            "learning_rate": 4e-5,
            "average": 0.0,
            "lr_schedule": "cosine",
            "warmup": 0.05,
            "freeze": [] if embedding else ["*embed*"],
            "checks": 2,
        }
    return settings


def _data(asked: Asked, split: str) -> dict[str, Any]:
    """What is calibrated on: the part `split` of the data given, or of what the model writes."""
    if asked.data is None:
        return {"generate": {"tokens": asked.tokens, "split": split}}
    return {"dataset": asked.data, "split": split}


def wants_neurons(layers: Iterable[Layer], parameters: int) -> bool:
    """Whether a model's neurons are in the budget: a large one has no room for what tells which of them may go."""
    return parameters <= LEARNS_WHOLE and any(layer.neurons for layer in layers)


def is_mostly_table(model: Any) -> bool:
    """Whether more than a third of a model's parameters are its token embedding's."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    return weight is not None and weight.numel() > MOSTLY_TABLE * sum(p.numel() for p in model.parameters())


def place_of(model: str, reduction: float) -> str:
    """Where the run of a model goes that names no place: runs/NAME-20."""
    name = Path(model.removeprefix("package:").rstrip("/")).name or "model"
    return f"runs/{name.removesuffix('.gguf')}-{round(100 * reduction)}"
