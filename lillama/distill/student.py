"""A student layer: a copy of its teacher with factors in it, its optimiser, and its best state so far."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lillama.base.device import Device
from lillama.contract import Layer, relative
from lillama.distill.best import Best
from lillama.distill.embedding import VocabularyLoss
from lillama.distill.losses import token_mean
from lillama.distill.losslog import LossLog
from lillama.errors import LillamaError
from lillama.lowrank import swap
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.storage import Factors, get_storage
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batch
from lillama.pretrained.walk import LayerPass
from lillama.recipe.schema import Distill
from lillama.registry import LOSSES, OBJECTIVES
from lillama.signature import parameters

FUSED = ("cpu", "cuda")  # devices with an AdamW in one pass over memory: a sixth of the time, which small steps notice

Inputs = Mapping[str, Tensor]  # what a layer is fed, by whose activations they are: "teacher", "student"


@dataclass(frozen=True)
class Training:
    """How layers learn: the plan, the recipe's `distill:`, and for how many steps.

    `floor` is what every token of an embedding counts for at least; with `spare_device` originals wait on the host.
    """

    plan: Plan
    distill: Distill
    floor: float
    device: Device
    total_steps: int
    spare_device: bool = False

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, then constant or cosine to 0."""
        distill = self.distill
        warmup = distill.warmup * self.total_steps
        if step < warmup:
            return distill.learning_rate * (step + 1) / (warmup + 1)
        if distill.lr_schedule == "constant":
            return distill.learning_rate
        progress = (step - warmup) / max(self.total_steps - warmup, 1)
        return distill.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Finished(NamedTuple):
    """A layer that has learned: the module, in the plan's storage, and its tensors to be stored, named inside it."""

    module: nn.Module
    tensors: dict[str, Tensor]


def build_layer(layer: Layer, teacher: nn.Module, plan: Plan, storage: str) -> nn.Module:
    """A float32 copy of the teacher with empty factor modules where the plan has them."""
    device = next(teacher.parameters()).device
    planned = [(relative(weight, layer), weight) for weight in plan.planned(layer)]
    # What the factors replace is not copied: hollow parameters stand in until they go.
    gone = swap.leaving(teacher, [(path, weight.kind) for path, weight in planned])
    hollow: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in gone}
    student = copy.deepcopy(teacher, hollow).float().eval()
    for path, weight in planned:
        rank = plan.ranks[weight.name]
        new = swap.replace(student, path, kind=weight.kind, storage=storage, rank=rank, device=device)
        student = student if path else new
    return student.requires_grad_(False)


def restore_layer(layer: Layer, teacher: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> nn.Module:
    """The finished student layer from its stored tensors (named inside the layer), the rest from its teacher."""
    student = build_layer(layer, teacher, plan, plan.storage)
    missing, unexpected = student.load_state_dict(tensors, strict=False)
    if troubles := [*unexpected, *(name for name in missing if _in_factors(student, name))]:
        raise LillamaError(f"the stored layer does not fit the plan: {troubles[0]}", where=layer.name)
    return student


def _in_factors(module: nn.Module, name: str) -> bool:
    """Whether the parameter or buffer `name` of `module` belongs to a factor module."""
    return swap.is_factorised(module.get_submodule(name.rpartition(".")[0]))


class Student:
    """One layer in training. `step` is the only place where factors learn, whatever the schedule."""

    def __init__(
        self,
        at: LayerPass,
        training: Training,
        init: Mapping[str, Factors],
        best_file: Path | None = None,
        owner: Student | None = None,
    ) -> None:
        """`init` holds the starting factors by weight; `best_file` is where the best state is kept, if not in memory.

        `owner` is the student of the embedding that a head is tied to. They have one set of factors: a step is one
        `step` of the embedding's and one of the head's, after which both gradients are applied together.
        """
        self.layer, self.position, self.training = at.layer, at.position, training
        self.plan, self.device, self.distill = training.plan, training.device, training.distill
        self.module = build_layer(at.layer, at.teacher, self.plan, self._storage_that_learns())
        self.owner = owner
        self.follower: Student | None = None
        for weight in self.plan.planned(at.layer):
            if not weight.tied:
                swap.set_factors(self.module, relative(weight, at.layer), weight.kind, *init[weight.name])
        self.vocabulary = self._watch_vocabulary(at) if at.layer.kind == "embedding" else None
        self.trained = self._find_trained() if owner is None else {}
        if owner is None:
            self.optimizer = torch.optim.AdamW(
                self.trained.values(),
                lr=self.distill.learning_rate,
                weight_decay=self.distill.weight_decay,
                fused=self.device.device.type in FUSED,
            )
        else:
            swap.tie(self.module, owner.module)
            owner.follower, self.optimizer = self, owner.optimizer
        self.objective: Callable[..., Tensor] = OBJECTIVES.get(self.distill.objective)
        self.loss: Callable[..., Tensor] = LOSSES.get(self.distill.loss)
        self.streams = [parameter.name.removeprefix("on_") for parameter in parameters(self.loss)]
        self.steps = 0
        self.log = LossLog(at.layer.name, self.distill, self.device.device)
        self.best = Best(best_file)
        self.best_loss = self._last_loss = math.inf
        self.best_together = math.inf  # of an embedding and the head tied to it
        self.first_loss = math.nan

    def _storage_that_learns(self) -> str:
        return get_storage(self.plan.storage).trained_as or self.plan.storage

    def _watch_vocabulary(self, at: LayerPass) -> VocabularyLoss:
        table: Tensor = cast(nn.Embedding, at.teacher).weight.detach()
        if self.training.spare_device:
            table = table.cpu()
        return VocabularyLoss(table, cast(LowRankEmbedding, self.module), self.training.floor)

    def _find_trained(self) -> dict[str, nn.Parameter]:
        chosen: dict[str, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters():
            if self.distill.train == "layer" or swap.is_factor(self.module, name):
                chosen[name] = parameter
                parameter.requires_grad_(True)
        return chosen

    def measure(self, batch: Batch, target: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, outputs by stream) of one batch; `inputs` holds the streams the loss wants."""
        outputs: dict[str, Tensor] = {}
        distances: dict[str, Tensor] = {}
        for name in self.streams:
            done = next(iter(outputs), None)
            # Token ids are the same in both streams, and so are hidden states below the first planned layer.
            if done is not None and (self.vocabulary or inputs[name] is inputs[done]):
                outputs[name], distances[f"on_{name}"] = outputs[done], distances[f"on_{done}"]
                continue
            with self.device.autocast():
                outputs[name] = batch.calls[self.position](self.module, inputs[name])
            distance = token_mean(self.objective(outputs[name].float(), target.float()), batch.mask)
            if self.vocabulary:
                # Checks are made on the same tokens every time.
                seed = self.steps + 1 if torch.is_grad_enabled() else 0
                distance = self.vocabulary.add_to(distance, self.module, self.objective, batch.tokens, seed)
            distances[f"on_{name}"] = distance
        return self.loss(**distances), outputs

    def step(self, batch: Batch, target: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """One update; returns the loss and the outputs before it, detached.

        Raises DistillationError for a loss that is not finite: at once on a CPU, elsewhere within the few steps for
        which losses stay on the device (LossLog).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate(self.steps)
        loss, outputs = self.measure(batch, target, inputs)
        self.log.add(self.steps + 1, loss.detach())
        loss.backward()
        if self.follower is None:  # else the head's gradient is still to come
            if self.distill.clip_norm is not None:
                nn.utils.clip_grad_norm_((self.owner or self).trained.values(), self.distill.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach(), {name: output.detach() for name, output in outputs.items()}

    @torch.no_grad()
    def check(self, held: Iterable[tuple[Batch, Tensor, Inputs]]) -> float:
        """The held-out loss now; remembers the state when it is the best so far."""
        total, loss = 0, 0.0
        for batch, target, inputs in held:
            loss += float(self.measure(batch, target, inputs)[0]) * batch.tokens
            total += batch.tokens
        return self.note_held_out(loss / max(total, 1))

    def note_held_out(self, loss: float) -> float:
        """Take note of a held-out loss of the present state, and keep the state if it is the best; returns the loss."""
        self.log.read()
        if self.steps == 0:
            self.first_loss = loss
        if self.follower is not None:  # judged together with the head, which comes next
            self._last_loss = loss
        elif self.owner is not None:
            together = self.owner._last_loss + loss
            if together < self.owner.best_together:
                self.owner.best_together, self.owner.best_loss, self.best_loss = together, self.owner._last_loss, loss
                self.owner.best.keep(self.owner.trained)
        elif loss < self.best_loss:
            self.best_loss = loss
            self.best.keep(self.trained)
        return loss

    def finish(self) -> Finished:
        """Put the best state back and the factors into the plan's storage; what is to be stored of the layer.

        That is the factor modules, and every other parameter that was trained. This is the last that is asked of a
        student. Raises DistillationError where a loss or a weight is not finite.
        """
        self.log.read()
        if self.owner is not None:  # which was finished before: its factors are this one's, under its own name
            indices = get_storage(self.plan.storage).indices
            return Finished(self.module, {name: self.owner.module.get_buffer(name) for name in indices})
        if self.best:
            self.best.restore(self.trained)
        if self.vocabulary:
            self.vocabulary.finish(cast(LowRankEmbedding, self.module))
        for weight in self.plan.planned(self.layer):
            path = relative(weight, self.layer)
            self.module = swap.store_as(self.module, path, weight.kind, self.plan.storage)
        tensors = {
            name: value.detach()
            for name, value in self.module.state_dict().items()
            if name in self.trained or _in_factors(self.module, name)
        }
        self.log.refuse_unless_finite(tensors)
        return Finished(self.module, tensors)
