"""A student layer: a copy of its teacher with factors in it, its optimiser, and its best state so far."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lillama import registry
from lillama.base.device import Device
from lillama.contract import Layer, relative
from lillama.distill import embedding as embedding_
from lillama.distill.best import Best
from lillama.distill.losses import token_mean
from lillama.errors import DistillationError, LillamaError
from lillama.lowrank import swap as factors
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batch
from lillama.recipe.schema import Distill, Recipe

FUSED = ("cpu", "cuda")  # devices with an AdamW in one pass over memory: a sixth of the time, which small steps notice


def build(layer: Layer, teacher: nn.Module, plan: Plan, storage: str) -> nn.Module:
    """A float32 copy of the teacher with empty factor modules where the plan has them."""
    device = next(teacher.parameters()).device
    planned = [(relative(weight, layer), weight) for weight in plan.planned(layer)]
    # What the factors replace is not copied: hollow parameters stand in until they go.
    gone = factors.leaving(teacher, [(path, weight.kind) for path, weight in planned])
    hollow: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in gone}
    student = copy.deepcopy(teacher, hollow).float().eval()
    for path, weight in planned:
        rank = plan.ranks[weight.name]
        new = factors.replace(student, path, kind=weight.kind, storage=storage, rank=rank, device=device)
        student = student if path else new
    return student.requires_grad_(False)


def finished(layer: Layer, teacher: nn.Module, plan: Plan, state: dict[str, Tensor]) -> nn.Module:
    """The finished student layer from its stored state (names relative to the layer), the rest from its teacher."""
    student = build(layer, teacher, plan, plan.storage)
    missing, unexpected = student.load_state_dict(state, strict=False)
    if troubles := [*unexpected, *(name for name in missing if _in_factors(student, name))]:
        raise LillamaError(f"the stored layer does not fit the plan: {troubles[0]}", where=layer.name)
    return student


def _in_factors(module: nn.Module, name: str) -> bool:
    """Whether the parameter or buffer `name` of `module` belongs to a factor module."""
    return factors.is_factorised(module.get_submodule(name.rpartition(".")[0]))


def learning_rate(distill: Distill, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: linear warm-up, then constant or cosine to 0."""
    warmup = distill.warmup * total
    if step < warmup:
        return distill.learning_rate * (step + 1) / (warmup + 1)
    if distill.lr_schedule == "constant":
        return distill.learning_rate
    progress = (step - warmup) / max(total - warmup, 1)
    return distill.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Student:
    """One layer in training. `step` is the only place where factors learn, whatever the schedule."""

    def __init__(
        self,
        layer: Layer,
        position: int,
        teacher: nn.Module,
        plan: Plan,
        recipe: Recipe,
        device: Device,
        init: dict[str, Tensor],
        total_steps: int,
        best_file: Path | None = None,
        owner: Student | None = None,
    ) -> None:
        """`best_file`: where the best state is kept, if not in memory.

        `owner` is the student of the embedding that a head is tied to. They have one pair of factors: a step is one
        `step` of the embedding's and one of the head's, after which both gradients are applied together.
        """
        self.layer, self.position, self.plan, self.device = layer, position, plan, device
        self.distill = recipe.distill
        self.total_steps = total_steps
        self.module = build(layer, teacher, plan, "factors")
        self.owner = owner
        self.follower: Student | None = None
        for weight in plan.planned(layer):
            if weight.tied:
                continue
            A, B = init[f"{weight.name}.A"], init[f"{weight.name}.B"]
            factors.set_factors(self.module, relative(weight, layer), weight.kind, A, B)
        self.embedding: embedding_.Watch | None = None
        if layer.kind == "embedding":
            self.embedding = embedding_.Watch(teacher, self.module, recipe.compress.embedding_floor)
        self.trained = self._trained() if owner is None else {}
        if owner is None:
            self.optimizer = torch.optim.AdamW(
                self.trained.values(),
                lr=self.distill.learning_rate,
                weight_decay=self.distill.weight_decay,
                fused=device.device.type in FUSED,
            )
        else:
            factors.tie(self.module, owner.module)
            owner.follower, self.optimizer = self, owner.optimizer
        self.objective: Callable[..., Tensor] = registry.OBJECTIVES.get(self.distill.objective)
        self.loss: Callable[..., Tensor] = registry.LOSSES.get(self.distill.loss)
        self.wants = [name.removeprefix("on_") for name in inspect.signature(self.loss).parameters]
        self.steps = 0
        self.best = Best(best_file)
        self.best_loss = self._loss = math.inf
        self.best_together = math.inf  # of an embedding and the head tied to it
        self.first_loss = math.nan

    def _trained(self) -> dict[str, nn.Parameter]:
        chosen: dict[str, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters():
            if self.distill.train == "layer" or factors.is_factor(self.module, name):
                chosen[name] = parameter
                parameter.requires_grad_(True)
        return chosen

    def distances(self, batch: Batch, target: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, outputs by stream) of one batch; `inputs` holds the streams the loss wants."""
        outputs: dict[str, Tensor] = {}
        on: dict[str, Tensor] = {}
        for name in self.wants:
            first = next(iter(outputs), name)
            if first != name and (self.embedding or inputs[name] is inputs[first]):
                outputs[name], on[f"on_{name}"] = outputs[first], on[f"on_{first}"]
                continue
            with self.device.autocast():
                outputs[name] = batch.calls[self.position](self.module, inputs[name])
            distance = token_mean(self.objective(outputs[name].float(), target.float()), batch.mask)
            if self.embedding:
                # Checks are made on the same tokens every time.
                seed = self.steps + 1 if torch.is_grad_enabled() else 0
                distance = self.embedding.with_all_tokens(distance, self.module, self.objective, batch.tokens, seed)
            on[f"on_{name}"] = distance
        return self.loss(**on), outputs

    def step(self, batch: Batch, target: Tensor, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """One update; returns the loss and the outputs before it, detached. Raises DistillationError if not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.distill, self.steps, self.total_steps)
        loss, outputs = self.distances(batch, target, inputs)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DistillationError(
                f"the loss became {value} at step {self.steps + 1}",
                where=self.layer.name,
                hint=f"Lower distill.learning_rate ({self.distill.learning_rate:g}) or set distill.clip_norm.",
            )
        loss.backward()
        if self.follower is None:  # else the head's gradient is still to come
            if self.distill.clip_norm is not None:
                nn.utils.clip_grad_norm_((self.owner or self).trained.values(), self.distill.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return value, {name: output.detach() for name, output in outputs.items()}

    @torch.no_grad()
    def check(self, held: Iterable[tuple[Batch, Tensor, dict[str, Tensor]]]) -> float:
        """The held-out loss now; remembers the state when it is the best so far."""
        total, loss = 0, 0.0
        for batch, target, inputs in held:
            loss += float(self.distances(batch, target, inputs)[0]) * batch.tokens
            total += batch.tokens
        return self.judge(loss / max(total, 1))

    def judge(self, loss: float) -> float:
        """Take note of a held-out loss of the present state."""
        if self.steps == 0:
            self.first_loss = loss
        if self.follower is not None:  # judged together with the head, which comes next
            self._loss = loss
        elif self.owner is not None:
            together = self.owner._loss + loss
            if together < self.owner.best_together:
                self.owner.best_together, self.owner.best_loss, self.best_loss = together, self.owner._loss, loss
                self.owner.best.keep(self.owner.trained)
        elif loss < self.best_loss:
            self.best_loss = loss
            self.best.keep(self.trained)
        return loss

    def state(self) -> dict[str, Tensor]:
        """The layer as it is stored: factor modules, and every other parameter that was trained, in the best state.

        Names are relative to the layer; factors are in the plan's storage.
        """
        if self.owner is not None:  # which was stored before
            return {"pivots": self.owner.module.get_buffer("pivots")} if self.plan.storage == "pivoted" else {}
        if self.best:
            self.best.restore(self.trained)
        if self.embedding:
            self.embedding.finish(self.module)
        for weight in self.plan.planned(self.layer):
            path = relative(weight, self.layer)
            self.module = factors.store_as(self.module, path, weight.kind, self.plan.storage)
        state = {
            name: value
            for name, value in self.module.state_dict().items()
            if name in self.trained or _in_factors(self.module, name)
        }
        if bad := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
            raise DistillationError(f"the weights {bad[0]} are not finite", where=self.layer.name)
        return {name: value.detach() for name, value in state.items()}
