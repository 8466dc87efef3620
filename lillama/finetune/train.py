"""Fine-tuning of a compressed model as a whole: transformers' Trainer on its factors, after distillation.

Examples come from the plugin's hook `finetune_data`, or for a causal model are blocks of text. The trainer's own
checkpoints in the run directory let the same command continue a run that was stopped.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from lillama.base.device import Device
from lillama.base.files import atomic_directory
from lillama.base.progress import Bar, Progress
from lillama.base.rundir import RunDirectory
from lillama.checkpoint import write as checkpoint
from lillama.errors import DistillationError, LillamaError
from lillama.finetune import adapters
from lillama.finetune.data import Collator, Examples, split, updates
from lillama.finetune.loss import loss_of
from lillama.lowrank import swap as factors
from lillama.recipe.schema import Finetune, Recipe
from lillama.report import track

FINETUNED = "finetuned"  # the checkpoint
WORK = "finetune"  # the trainer's own directory, while it trains
SETTINGS = "finetune.json"


def finished(directory: RunDirectory, section: Finetune) -> bool:
    """Whether this fine-tuning is done; a result of other settings is an error that says so."""
    if not directory.has(f"{FINETUNED}/config.json"):
        return False
    held, wanted = directory.json(SETTINGS), section.model_dump(mode="json")
    if held != wanted:
        keys = sorted(key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key))
        raise LillamaError(
            f"the run holds a fine-tuning with another {', '.join(keys)}",
            where=f"finetune.{keys[0]}",
            hint=f"Give another run.out, or remove {directory.path / FINETUNED} to do it again.",
        )
    return True


def finetune(
    model: Any,
    teacher: Any,
    examples: Examples,
    recipe: Recipe,
    device: Device,
    directory: RunDirectory,
    progress: Progress,
) -> None:
    """Train `model` (float32, on the CPU) in place to the state with the best held-out loss.

    With `lora`, adapters are trained and merged into it. `teacher` is the original where the section wants its
    predictions, else None. Continues from the trainer's last checkpoint in `directory`. Raises
    DistillationError when a loss is not finite.
    """
    from transformers import Seq2SeqTrainer, Trainer

    if not examples:
        raise LillamaError("the data gives no example", where="finetune.dataset")
    section = recipe.finetune
    if section is None:
        raise LillamaError("the recipe has no such section", where="finetune")
    work = directory.path / WORK
    settings = section.model_dump(mode="json")
    if not directory.has(SETTINGS) or directory.json(SETTINGS) != settings:
        shutil.rmtree(work, ignore_errors=True)  # of other settings, and not finished
        directory.put_json(SETTINGS, settings)
    kept = factors.use_trainable_storage(model)
    freeze(model, section.freeze)
    learner = model if section.lora is None else adapters.attach(model, section.lora)
    generator = torch.Generator().manual_seed(section.seed)
    learned, held = split(examples, section.holdout, generator)
    share = section.teacher
    total = section.steps or updates(len(learned), section)
    shifted = not model.config.is_encoder_decoder
    base = Trainer if shifted else Seq2SeqTrainer

    class Finetuner(base):  # type: ignore[valid-type, misc]  # one of two classes
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            with device.autocast():
                loss, outputs = loss_of(model, self.teacher, inputs, share, shifted, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    with progress.phase("finetune", total) as bar:
        trainer = Finetuner(
            model=learner,
            args=_arguments(recipe, section, device, work, total, bool(held), shifted),
            train_dataset=learned,
            eval_dataset=held or None,
            data_collator=Collator(model.config.get_text_config().pad_token_id or 0),
            callbacks=[_watcher(bar, directory)],
        )
        trainer.teacher = None if teacher is None else teacher.to(device.device).eval().requires_grad_(False)
        trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the number of labels of the whole update
        _no_prints(trainer)
        last = last_checkpoint(work)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if held and not math.isfinite(trainer.state.best_metric or math.nan):
        raise DistillationError("no held-out loss was finite", where="finetune", hint=_SLOWER)
    if learner is not model:
        adapters.merge(learner)
    for name, kind, storage in kept:
        factors.store_as(model, name, kind, storage)


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


def last_checkpoint(work: Path) -> Path | None:
    """The trainer's last whole checkpoint: its state file is written last."""
    found = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save(model: Any, dtype: torch.dtype, original: Path, directory: RunDirectory, card: str) -> None:
    """Write the fine-tuned checkpoint, with what stands beside the weights of the compressed one (`original`)."""
    with atomic_directory(directory.path / FINETUNED) as target:
        model.to(device="cpu", dtype=dtype).save_pretrained(target)
        checkpoint.copy_beside(original, target)
        (target / "README.md").write_text(card, encoding="utf-8")
    names = sorted(file.name for file in (directory.path / FINETUNED).iterdir())
    directory.record(*(f"{FINETUNED}/{name}" for name in names))
    shutil.rmtree(directory.path / WORK, ignore_errors=True)


_SLOWER = "Lower finetune.learning_rate."


def _arguments(
    recipe: Recipe, section: Finetune, device: Device, work: Path, total: int, held: bool, shifted: bool
) -> Any:
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    every = max(math.ceil(total / section.checks), 1)
    checked: dict[str, Any] = {}
    if held:
        checked = {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            "prediction_loss_only": True,
        }
    return (TrainingArguments if shifted else Seq2SeqTrainingArguments)(
        output_dir=str(work),
        max_steps=total,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        lr_scheduler_type="constant_with_warmup" if section.lr_schedule == "constant" else section.lr_schedule,
        warmup_steps=round(section.warmup * total),
        max_grad_norm=section.clip_norm,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=section.seed,
        use_cpu=device.device.type == "cpu",
        bf16=device.compute == torch.bfloat16,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(recipe.run.track) or "none",
        run_name=track.name(recipe),
        project=track.PROJECT,
        disable_tqdm=True,
        dataloader_pin_memory=device.device.type == "cuda",
        **checked,
    )


def _watcher(bar: Bar, directory: RunDirectory) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Shows what the trainer does, and stops it when a loss is not finite."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.skip(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.advance()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss, held = (logs or {}).get("loss"), (logs or {}).get("eval_loss")
            if loss is not None:
                if not math.isfinite(loss):
                    raise DistillationError(
                        f"the loss became {loss} at step {state.global_step}", where="finetune", hint=_SLOWER
                    )
                bar.advance(0, loss=loss)
            if held is not None:
                directory.event("check", finetune=True, step=state.global_step, held_out_loss=held)

    return Watcher()


def _no_prints(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
