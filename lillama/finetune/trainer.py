"""transformers' Trainer as fine-tuning uses it: our loss, our device, our progress; it keeps its own checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lillama.base import ranks, stop
from lillama.base.device import Device
from lillama.base.progress import Bar, Progress
from lillama.base.rundir import RunDirectory
from lillama.errors import DistillationError
from lillama.finetune.average import Average
from lillama.finetune.data import Collator, Examples
from lillama.finetune.divided import divide, learned_of, whole_learned
from lillama.finetune.loss import loss_of
from lillama.finetune.resume import AVERAGED, load_best, load_state, save_learned, seal_checkpoint
from lillama.finetune.together import Together
from lillama.recipe.schema import Finetune
from lillama.report import track

WORK = "finetune"  # the trainer's own directory, while it trains
SLOWER = "Lower finetune.learning_rate."


@dataclass(frozen=True)
class Setting:
    """What a fine-tuning is asked for, and where it happens; `trackers` know the run as `name`.

    `blocks` are those of the model, by name, of which each process is to have a part; None: each has it whole.
    """

    section: Finetune
    device: Device
    directory: RunDirectory
    progress: Progress
    trackers: tuple[str, ...] = ()
    name: str = "run"
    blocks: tuple[str, ...] | None = None

    @property
    def work(self) -> Path:
        """Where the trainer keeps its checkpoints."""
        return self.directory.path / WORK


def build_trainer(learner: Any, teacher: Any, parts: tuple[Examples, Examples], setting: Setting, bar: Bar) -> Any:
    """A trainer of `learner` on the first of `parts`, judged on the second; `bar` has one step per update.

    `teacher` is the original where the section wants its predictions, else None. A loss that is not finite stops it
    with a DistillationError.
    """
    from transformers import PrinterCallback, Seq2SeqTrainer, Trainer

    learned, held = parts
    shifted = not learner.config.is_encoder_decoder
    share, device = setting.section.teacher, setting.device
    average = Average(learned_of(learner), setting.section.averaged_from(bar.total))

    class Finetuner(Together, Trainer if shifted else Seq2SeqTrainer):  # type: ignore[misc]  # one of two classes
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            with device.autocast():
                loss, outputs = loss_of(model, self.teacher, inputs, share, shifted, num_items_in_batch)
            loss = loss if self.counts else loss * 0.0
            return (loss, outputs) if return_outputs else loss

        def create_optimizer(self, *given: Any, **options: Any) -> torch.optim.Optimizer:
            made = self.optimizer is None
            optimizer: torch.optim.Optimizer = super().create_optimizer(*given, **options)
            if made and setting.section.vector_learning_rate is not None:
                learn_vectors_at(optimizer, setting.section.vector_learning_rate)
            return optimizer

        def evaluate(self, *given: Any, **options: Any) -> Any:
            with average.in_place():
                return super().evaluate(*given, **options)

        # What learned is stored under its own names (resume.py).
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            save_learned(self.whole["learned"] if self.divided else learned_of(self.model), Path(output_dir))
            if average.mean:
                with average.in_place():
                    learned = self.whole["averaged"] if self.divided else learned_of(self.model)
                    save_learned(learned, Path(output_dir), AVERAGED)

        def gather_whole(self, model: Any) -> dict[str, Any]:
            whole = super().gather_whole(model)
            if average.mean:
                with average.in_place():
                    whole["averaged"] = whole_learned(model)
            return whole

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_state(self.model, average, Path(resume_from_checkpoint))

        def _load_best_model(self) -> None:
            ranks.agree(None)  # the first process may still be writing it
            load_best(self.model, Path(self.state.best_model_checkpoint))

    trainer = Finetuner(
        model=learner,
        args=arguments(setting, bar.total, bool(held), shifted),
        train_dataset=learned,
        eval_dataset=held or None,
        data_collator=Collator(learner.config.get_text_config().pad_token_id or 0),
        callbacks=[_watcher(bar, setting, average)],
    )
    trainer.average = average
    trainer.device_of_run = device
    trainer.divided = setting.blocks is not None
    trainer.teacher = None if teacher is None else placed(teacher.eval().requires_grad_(False), setting)
    trainer.model_accepts_loss_kwargs = True  # compute_loss divides by the number of labels of the whole update
    trainer.remove_callback(PrinterCallback)
    return trainer


def placed(model: Any, setting: Setting) -> Any:
    """`model` where it runs: itself, or where processes divide it a copy of which this one has its part."""
    device = setting.device.device
    return model.to(device) if setting.blocks is None else divide(model, setting.blocks, device)


def learn_vectors_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give the parameters of one dimension a learning rate of their own, before any update."""
    for group in list(optimizer.param_groups):
        vectors = [parameter for parameter in group["params"] if parameter.dim() < 2]
        if vectors:
            group["params"] = [parameter for parameter in group["params"] if parameter.dim() >= 2]
            optimizer.add_param_group({**group, "params": vectors, "lr": rate})


def arguments(setting: Setting, updates: int, held: bool, shifted: bool) -> Any:
    """The trainer's arguments. `held`: there are examples to judge by; `shifted`: the model is a causal one."""
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    section, device = setting.section, setting.device
    every = max(math.ceil(updates / section.checks), 1)
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
    made = (TrainingArguments if shifted else Seq2SeqTrainingArguments)(
        output_dir=str(setting.work),
        max_steps=updates,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        lr_scheduler_type="constant_with_warmup" if section.lr_schedule == "constant" else section.lr_schedule,
        warmup_steps=round(section.warmup * updates),
        max_grad_norm=section.clip_norm,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=3,  # the newest, the one before it, and the best that this one names
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=section.seed,
        use_cpu=device.device.type == "cpu",
        bf16=device.compute == torch.bfloat16,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=(list(setting.trackers) if ranks.is_first() else []) or "none",
        run_name=setting.name,
        project=track.PROJECT,
        disable_tqdm=True,
        dataloader_pin_memory=device.device.type == "cuda",
        **checked,
    )
    return _keep_on(device.device, made)


def _keep_on(device: torch.device, made: Any) -> Any:
    """The trainer's arguments `made`, for one that stays on `device`.

    Left to itself it takes the first card, and all that are there as one DataParallel: a batch then is several times
    the recipe's, the number of labels that a loss is divided by is that of one card, and the teacher is elsewhere.
    """
    if made.device.type != "cpu" or device.type != "cpu":  # asking for it makes transformers choose
        made.__dict__["_setup_devices"] = device  # where a cached property keeps its value
        made._n_gpu = 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return made


def _watcher(bar: Bar, setting: Setting, average: Average) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Shows what the trainer does, seals what it saves, and stops it when a loss is not finite."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.skip(state.global_step)
            if state.best_model_checkpoint is not None:  # the run directory may have been moved since
                state.best_model_checkpoint = str(setting.work / Path(state.best_model_checkpoint).name)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.advance()
            average.add(state.global_step)
            if setting.blocks is not None:
                stop.now()  # all would have to save together, and none knows when the others hear of it
            if stop.is_wanted() and ranks.is_first():
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if ranks.is_first():
                seal_checkpoint(setting.work, state.global_step, setting.section, setting.blocks is not None)
            stop.now()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss, held = (logs or {}).get("loss"), (logs or {}).get("eval_loss")
            if loss is not None:
                if not math.isfinite(loss):
                    raise DistillationError(
                        f"the loss became {loss} at step {state.global_step}", where="finetune", hint=SLOWER
                    )
                bar.advance(0, loss=loss)
            if held is not None:
                setting.directory.event("check", finetune=True, step=state.global_step, held_out_loss=held)

    return Watcher()
