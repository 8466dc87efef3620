"""A student layer: a copy of its teacher with factors in it, its optimiser, and its best state so far."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from lillama import factors, registry
from lillama.contract import Layer, Weight
from lillama.device import Device
from lillama.errors import DistillationError, LillamaError
from lillama.losses import token_mean
from lillama.plan import Plan
from lillama.recipe import Distill, Recipe
from lillama.streams import Batch


def relative(weight: Weight, layer: Layer) -> str:
    """The name of a weight's module inside its layer; empty when it is the layer itself."""
    return weight.name.removeprefix(layer.name).removeprefix(".")


def needs(recipe: Recipe) -> tuple[set[str], bool]:
    """Which streams the recipe's loss runs on ("teacher", "student"), and whether its init wants Grams."""
    loss = inspect.signature(registry.LOSSES.get(recipe.distill.loss)).parameters
    init = inspect.signature(registry.INITIALISERS.get(recipe.compress.init)).parameters
    return {name.removeprefix("on_") for name in loss}, "gram" in init


def initial_factors(
    layer: Layer, teacher: nn.Module, plan: Plan, recipe: Recipe, grams: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The starting factors of a layer's planned weights, as `<weight>.A` and `<weight>.B` in float32."""
    initialise = registry.INITIALISERS.get(recipe.compress.init)
    wanted = inspect.signature(initialise).parameters
    found = {}
    for weight in plan.planned(layer):
        W: Tensor = cast(nn.Linear, teacher.get_submodule(relative(weight, layer))).weight
        arguments: dict[str, Any] = {}
        if "gram" in wanted and grams is not None:
            arguments["gram"] = grams[weight.name]
        if "generator" in wanted:
            # Seeded by name, so that neither the schedule nor a resume changes what is drawn.
            digest = hashlib.sha256(f"{recipe.run.seed}/{weight.name}".encode()).digest()
            arguments["generator"] = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        A, B = initialise(W.detach(), plan.ranks[weight.name], **arguments)
        found[f"{weight.name}.A"], found[f"{weight.name}.B"] = A.float(), B.float()
    return found


def build(layer: Layer, teacher: nn.Module, plan: Plan, storage: str) -> nn.Module:
    """A float32 copy of the teacher with empty factor modules where the plan has them."""
    student = copy.deepcopy(teacher).float().eval()
    for weight in plan.planned(layer):
        rank = plan.ranks[weight.name]
        factors.replace(student, relative(weight, layer), kind=weight.kind, storage=storage, rank=rank)
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
    ) -> None:
        self.layer, self.position, self.plan, self.device = layer, position, plan, device
        self.distill = recipe.distill
        self.total_steps = total_steps
        self.module = build(layer, teacher, plan, "factors")
        for weight in plan.planned(layer):
            module = self.module.get_submodule(relative(weight, layer))
            module.set_factors(init[f"{weight.name}.A"], init[f"{weight.name}.B"])  # type: ignore[operator]
        self.trained = self._trained()
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.distill.learning_rate, weight_decay=self.distill.weight_decay
        )
        self.objective: Callable[..., Tensor] = registry.OBJECTIVES.get(self.distill.objective)
        self.loss: Callable[..., Tensor] = registry.LOSSES.get(self.distill.loss)
        self.wants = [name.removeprefix("on_") for name in inspect.signature(self.loss).parameters]
        self.steps = 0
        self.best: dict[str, Tensor] | None = None
        self.best_loss = math.inf
        self.first_loss = math.nan

    def _trained(self) -> dict[str, nn.Parameter]:
        chosen: dict[str, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters():
            is_factor = _in_factors(self.module, name) and not name.endswith("bias")
            if self.distill.train == "layer" or is_factor:
                chosen[name] = parameter
                parameter.requires_grad_(True)
        return chosen

    def distances(self, batch: Batch, target: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, outputs by stream) of one batch; `inputs` holds the streams the loss wants."""
        outputs, on = {}, {}
        for name in self.wants:
            with self.device.autocast():
                outputs[name] = batch.calls[self.position](self.module, inputs[name])
            on[f"on_{name}"] = token_mean(self.objective(outputs[name].float(), target.float()), batch.mask)
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
        if self.distill.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained.values(), self.distill.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return value, {name: output.detach() for name, output in outputs.items()}

    @torch.no_grad()
    def check(self, pairs: Sequence[tuple[Batch, Tensor, dict[str, Tensor]]]) -> float:
        """The held-out loss now; remembers the state when it is the best so far."""
        total = sum(batch.tokens for batch, _, _ in pairs)
        loss = sum(
            float(self.distances(batch, target, inputs)[0]) * batch.tokens for batch, target, inputs in pairs
        ) / max(total, 1)
        return self.judge(loss)

    def judge(self, loss: float) -> float:
        """Take note of a held-out loss of the present state."""
        if self.steps == 0:
            self.first_loss = loss
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        return loss

    def state(self) -> dict[str, Tensor]:
        """The layer as it is stored: factor modules, and every other parameter that was trained, in the best state.

        Names are relative to the layer; factors are in the plan's storage.
        """
        if self.best is not None:
            with torch.no_grad():
                for name, value in self.best.items():
                    self.trained[name].copy_(value)
        for weight in self.plan.planned(self.layer):
            path = relative(weight, self.layer)
            parent, _, child = path.rpartition(".")
            module = factors.to_storage(self.module.get_submodule(path), self.plan.storage)  # type: ignore[arg-type]
            setattr(self.module.get_submodule(parent), child, module)
        state = {
            name: value
            for name, value in self.module.state_dict().items()
            if name in self.trained or _in_factors(self.module, name)
        }
        if bad := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
            raise DistillationError(f"the weights {bad[0]} are not finite", where=self.layer.name)
        return {name: value.detach() for name, value in state.items()}
