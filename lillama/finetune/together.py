"""A trainer among others: several processes of a run make each update together, of the examples that one would take.

Each has a trainer of its own, which knows nothing of the others: all see the same examples in the same order. Of the
rows of an update, those of all the batches it accumulates, each computes some; then gradients and loss are added up
(base/ranks.py), before they are clipped, so that every trainer takes the step that one alone would. torch's
DistributedDataParallel would divide by processes, not labels, and does not see what is run in parts (loss.py). Where an
update has fewer rows than there are processes, those without one make the original's predictions (elsewhere.py); where
each has a part of the model (divided.py), they run a row of another's along, which counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lillama.base import ranks, shares
from lillama.finetune.data import of_model
from lillama.finetune.divided import divide_state, is_divided, whole_learned, whole_state
from lillama.finetune.elsewhere import Elsewhere, Help, help_with, share_out


def take_rows(batch: Any, rows: slice) -> Any:
    """Some rows of a batch: of tensors, and of tuples and dictionaries of them."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, tuple):
        return tuple(take_rows(part, rows) for part in batch)
    return {name: take_rows(part, rows) for name, part in batch.items()}


def own_of(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the batches of one update this process's rows, neighbours among all; of some batches there may be none."""
    counts = [len(batch["labels"]) for batch in batches]
    mine, found, start = shares.part(sum(counts)), [], 0
    for batch, count in zip(batches, counts):
        first, last = (min(max(edge - start, 0), count) for edge in (mine.start, mine.stop))
        found.append(take_rows(batch, slice(first, last)))
        start += count
    return found


class Together:
    """Mixed in before transformers' Trainer; what it does of it where there is one process, it leaves alone."""

    teacher: Any = None  # the original, where its predictions are learned
    divided = False  # whether each process has a part of the model
    counts = True  # whether the rows that run are this process's own
    whole: dict[str, Any]  # what a checkpoint is to hold of a model that is divided
    _own: Tensor | float = 0.0  # the loss of this process's rows of the update at hand
    _helps: list[tuple[dict[str, Any], list[Help]]]  # for its batches that are still to come, whole

    def get_batch_samples(self, *given: Any, **options: Any) -> Any:
        """The batches of an update, less the rows of others; the number of labels is that of all."""
        batches, items = super().get_batch_samples(*given, **options)  # type: ignore[misc]
        if ranks.world() == 1:
            return batches, items
        rows = [len(batch["labels"]) for batch in batches]
        helps = [[] for _ in batches] if self.divided else share_out(rows, self.teacher)
        self._helps = list(zip(batches, helps))
        return own_of(batches), items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The loss of all rows of an update, once its gradients are there; 0 before."""
        trainer: Any = self
        if ranks.world() == 1:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        loss, teacher = torch.zeros((), device=trainer.args.device), self.teacher
        whole = self._helps[0][0]
        for helper in self._help():
            self.teacher = Elsewhere(teacher, helper)
        self.counts = len(inputs["labels"]) > 0
        if self.divided and not self.counts:
            inputs = take_rows(whole, slice(0, 1))
        if len(inputs["labels"]):
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.teacher, self.counts = teacher, True
        self._own = self._own + loss
        if not trainer.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        total, self._own = self._own, 0.0
        learned = [p for p in model.parameters() if p.requires_grad and not is_divided(p)]
        ranks.sum_gradients_(learned, total)
        return total

    def _help(self) -> list[int]:
        """Help others with the next batch of this update; the process that helps this one with it, if one does."""
        trainer: Any = self
        batch, helps = self._helps.pop(0)
        for one in helps:
            if one.helper == ranks.rank():
                row = trainer._prepare_inputs(take_rows(batch, slice(one.row, one.row + 1)))
                with trainer.device_of_run.autocast():
                    help_with(self.teacher, of_model(row), one.learner)
        return [one.helper for one in helps if one.learner == ranks.rank()]

    def evaluation_loop(self, dataloader: Any, *given: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """The mean loss over examples; the processes share the batches out."""
        if ranks.world() == 1:
            return super().evaluation_loop(  # type: ignore[misc]
                dataloader, *given, metric_key_prefix=metric_key_prefix, **options
            )
        from transformers.trainer_utils import EvalLoopOutput

        trainer: Any = self
        trainer.model.eval()
        loss, count = 0.0, 0
        for batches in _rounds(dataloader):
            count += sum(len(batch["labels"]) for batch in batches)
            own = ranks.rank() < len(batches)
            if own or self.divided:  # of a divided model all run equally often
                batch = batches[ranks.rank() if own else 0]
                found = float(trainer.prediction_step(trainer.model, batch, True)[0]) * len(batch["labels"])
                loss += found if own else 0.0
        mean = ranks.summed([loss])[0] / max(count, 1)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, count)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The first process saves; the others know where."""
        trainer: Any = self
        if self.divided:
            self.whole = self.gather_whole(model)
        if ranks.is_first():
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        elif trainer.state.best_global_step:
            place = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}"
            trainer.state.best_model_checkpoint = str(place)
        self.whole = {}

    def gather_whole(self, model: Any) -> dict[str, Any]:
        """What a checkpoint is to hold of a model that is divided, whole; all processes call."""
        trainer: Any = self
        state = None if self._all_learned() else whole_state(trainer.optimizer)
        return {"learned": whole_learned(model), "optimizer": state}

    def _all_learned(self) -> bool:
        """Whether there is no update to come, for which the optimiser's state would be wanted."""
        state = self.state  # type: ignore[attr-defined]
        return bool(state.global_step >= state.max_steps)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimiser's state, whole where it is divided; none when all is learned: it is two thirds of the bytes."""
        trainer: Any = self
        if self._all_learned():
            return
        optimizer = trainer.optimizer
        if self.divided:
            trainer.optimizer = SimpleNamespace(state_dict=lambda: self.whole["optimizer"])
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        trainer.optimizer = optimizer

    def create_optimizer(self, *given: Any, **options: Any) -> torch.optim.Optimizer:
        """An optimiser that loads its part of a whole state, where each process has a part."""
        trainer: Any = self
        made = trainer.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*given, **options)  # type: ignore[misc]
        if made and self.divided:
            optimizer.register_load_state_dict_pre_hook(divide_state)
        return optimizer


def _rounds(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Batches, as many at a time as there are processes; the last time there may be fewer."""
    left = iter(batches)
    while some := list(islice(left, ranks.world())):
        yield some
