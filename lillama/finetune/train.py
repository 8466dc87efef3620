"""Fine-tuning of a compressed model as a whole: transformers' Trainer on its factors, after distillation.

Examples come from the plugin's hook `finetune_data`, or for a causal model are blocks of text. The trainer's own
checkpoints in the run directory let the same command continue a run that was stopped.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from typing import Any

import torch

from lillama.base import ranks, stop
from lillama.base.files import write_json
from lillama.base.rundir import FINETUNED, MODEL, RunDirectory
from lillama.checkpoint import write as checkpoint
from lillama.checkpoint.seal import seal
from lillama.errors import DistillationError, LillamaError
from lillama.finetune import adapters, resume
from lillama.finetune.average import Anchor
from lillama.finetune.data import Examples, split, updates
from lillama.finetune.divided import gather
from lillama.finetune.faster import quick_attention
from lillama.finetune.settings import refuse_other
from lillama.finetune.trainer import SLOWER, WORK, Setting, build_trainer, placed
from lillama.lowrank.conversions import store_each, use_trainable_storage
from lillama.recipe.schema import Finetune

SETTINGS = "finetune.json"  # in the checkpoint: the section of the recipe that made it


def finished(directory: RunDirectory, section: Finetune) -> bool:
    """Whether this fine-tuning is done; a result of other settings is an error that says so."""
    if not directory.has(f"{FINETUNED}/config.json"):
        return False
    # Earlier versions kept the settings beside the checkpoint.
    name = next((one for one in (f"{FINETUNED}/{SETTINGS}", SETTINGS) if directory.has(one)), None)
    if name is None:
        return False
    held, wanted, place = directory.json(name), section.model_dump(mode="json"), directory.path / FINETUNED
    refuse_other(held, wanted, section="finetune", what="a fine-tuning", place=place)
    return True


def finetune(model: Any, teacher: Any, examples: Examples, setting: Setting) -> None:
    """Train `model` (float32, on the CPU) in place to the state with the best held-out loss.

    With `anchor`, it then goes back by that share. With `lora`, adapters are trained and merged into it. `teacher` is
    the original where the section wants its predictions, else None. Continues from the last whole checkpoint of the
    trainer in the run directory. Raises DistillationError when a loss is not finite.
    """
    if not examples:
        raise LillamaError("the data gives no example", where="finetune.dataset")
    section, directory = setting.section, setting.directory
    last = ranks.by_first(lambda: resume.last_checkpoint(setting.work, section, setting.blocks is not None))
    if last is not None:
        directory.event("resumed", finetune=True, step=resume.step_of(last))
    torch.manual_seed(section.seed)  # of adapters, which are drawn
    kept = use_trainable_storage(model)
    freeze(model, section.freeze)
    anchor = Anchor(model, section.anchor)
    learner = model if section.lora is None else adapters.attach(model, section.lora)
    parts = split(examples, section.holdout, torch.Generator().manual_seed(section.seed))
    total = section.steps or updates(len(parts[0]), section)
    quick = quick_attention(model, teacher, setting.device, max(one["labels"].numel() for one in examples))
    with setting.progress.phase("finetune", total) as bar, stop.at_a_good_moment(), quick, ranks.naming_the_lost():
        running = learner if setting.blocks is None else placed(learner, setting)
        trainer = build_trainer(running, teacher, parts, setting, bar)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if not parts[1]:  # or the best state that was judged is there already
            trainer.average.swap()
        if running is not learner:
            gather(running, learner)
    if parts[1] and not math.isfinite(trainer.state.best_metric or math.nan):
        raise DistillationError("no held-out loss was finite", where="finetune", hint=SLOWER)
    if learner is not model:
        adapters.merge(learner)
    anchor.go_back(model)
    store_each(model, kept)


def freeze(model: Any, globs: list[str] | None) -> None:
    """Let every parameter learn but those that match; with None, but those of the encoder where there is one."""
    model.requires_grad_(True)
    if globs is None:
        if model.config.is_encoder_decoder:
            model.get_encoder().requires_grad_(False)
        return
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise LillamaError(
                f"no parameter matches '{glob}'", where="finetune.freeze", hint=f"They are called like {names[0]}."
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LillamaError("everything is frozen", where="finetune.freeze", hint="Freeze less.")


def save(model: Any, dtype: torch.dtype, section: Finetune, directory: RunDirectory, card: str) -> None:
    """Write the fine-tuned checkpoint, with what stands beside the weights of the compressed one."""
    with directory.put_directory(FINETUNED, seal) as target:
        model.to(device="cpu", dtype=dtype).save_pretrained(target)
        checkpoint.copy_beside(directory.path / MODEL, target)
        (target / "README.md").write_text(card, encoding="utf-8")
        write_json(target / SETTINGS, section.model_dump(mode="json"))
    clear(directory)


def clear(directory: RunDirectory) -> None:
    """Remove the trainer's checkpoints: the result is there."""
    shutil.rmtree(directory.path / WORK, ignore_errors=True)
