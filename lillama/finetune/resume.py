"""Going on with a fine-tuning that was stopped: from the last of the trainer's checkpoints that is whole.

A checkpoint is sealed once the trainer has written all of it, with the settings it was made under. What is not sealed,
or not as it was sealed, was cut short or damaged: it is removed, and the one before it serves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama.base.files import write_json, write_tensors
from lillama.base.tensorfile import TensorFile
from lillama.checkpoint.seal import damaged, seal
from lillama.errors import LillamaError
from lillama.finetune.average import Average
from lillama.finetune.divided import learned_of, put
from lillama.finetune.settings import differing
from lillama.recipe.schema import Finetune

SETTINGS = "lillama.finetune.json"
DIVIDED = "divided among processes"  # a key among the settings, which are a recipe's
LEARNED = "learned.safetensors"
AVERAGED = "averaged.safetensors"  # the mean of states, where one is made
STATE = "trainer_state.json"  # of the trainer; names the best checkpoint so far


def save_learned(learned: Mapping[str, Tensor], checkpoint: Path, file: str = LEARNED) -> None:
    """Store every parameter that learns in a file of the checkpoint, under the name it has in the model.

    Not by `save_pretrained`, which writes the names of the hub's files: those of fused experts are others than the
    module's, and the trainer would read back only those that are the same.
    """
    write_tensors(checkpoint / file, {name: tensor.data for name, tensor in learned.items()})


@torch.no_grad()
def load_learned(model: Any, checkpoint: Path, file: str = LEARNED) -> None:
    """Put back what `save_learned` stored, all of it."""
    stored = TensorFile(checkpoint / file)
    parameters = learned_of(model)
    if {*stored} != parameters.keys():
        raise LillamaError(
            "the checkpoint is that of another model", where=str(checkpoint), hint="Remove it, and begin again."
        )
    for name, parameter in parameters.items():
        put(parameter, stored.read(name))


def load_state(model: Any, average: Average, checkpoint: Path) -> None:
    """Put back what learned, and the mean of its states where one had begun."""
    if (checkpoint / AVERAGED).exists():
        load_learned(model, checkpoint, AVERAGED)
        average.take()
    load_learned(model, checkpoint)


def load_best(model: Any, checkpoint: Path) -> None:
    """Put back the state that was judged: the mean, where one had begun."""
    load_learned(model, checkpoint, AVERAGED if (checkpoint / AVERAGED).exists() else LEARNED)


def seal_checkpoint(work: Path, step: int, section: Finetune, divided: bool = False) -> None:
    """Mark the trainer's checkpoint of `step` as whole; `divided`: of a model of which each process has a part."""
    directory = work / f"checkpoint-{step}"
    write_json(directory / SETTINGS, section.model_dump(mode="json") | {DIVIDED: divided})
    seal(directory)


def last_checkpoint(work: Path, section: Finetune, divided: bool = False) -> Path | None:
    """The newest checkpoint below `work` that can be continued from under these settings; others are removed.

    The best checkpoint that it names must be whole too, since the trainer goes back to that one in the end. Raises
    LillamaError where it is of a model that was divided, and now is not, or the other way round: an optimiser has its
    parameters in another order then.
    """
    found = sorted((path for path in work.glob("checkpoint-*") if path.is_dir()), key=step_of)
    whole = [path for path in found if _is_whole(path, section)]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    for path in reversed(whole):
        best = json.loads((path / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if best is None or (work / Path(best).name) in whole:
            if _settings(path).get(DIVIDED, False) != divided:
                raise LillamaError(
                    f"the fine-tuning in {work} began with a model that was {'whole' if divided else 'divided'}",
                    where="run.divide",
                    hint=f"Set it to {str(not divided).lower()}, or remove {work} to begin again.",
                )
            return path
        shutil.rmtree(path)
    return None


def step_of(checkpoint: Path) -> int:
    """After which step a checkpoint was written; -1 for what is none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(checkpoint: Path, section: Finetune) -> bool:
    if damaged(checkpoint) != []:
        return False
    held = {key: value for key, value in _settings(checkpoint).items() if key != DIVIDED}
    return not differing(held, section.model_dump(mode="json"))


def _settings(checkpoint: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
    return held
