"""A student layer: a copy of its teacher with factors in it, its optimiser, and its best state so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lillama.base import ranks
from lillama.base.device import Device
from lillama.base.finite import is_finite
from lillama.contract import Layer, relative
from lillama.distill.best import Best
from lillama.distill.build import Left, build_layer, find_unfit, tensors_of
from lillama.distill.embedding import VocabularyLoss
from lillama.distill.heads import head_distances
from lillama.distill.losses import of_all_rows, token_mean
from lillama.distill.losslog import LossLog
from lillama.errors import DistillationError
from lillama.lowrank import swap
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.fit import stored_fit
from lillama.lowrank.storage import Factors, get_storage
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batch
from lillama.pretrained.walk import HeadTarget, LayerPass, Originals, Target
from lillama.recipe.schema import Distill
from lillama.registry import LOSSES, OBJECTIVES
from lillama.signature import parameters

FUSED = ("cpu", "cuda")  # devices with an AdamW in one pass over memory: a sixth of the time, which small steps notice

RETRIES = 2  # how often a layer tries again from its best state, before it stops learning
SLOWER = 0.25  # times the learning rate, every time

Inputs = Mapping[str, Tensor]  # what a layer is fed, by whose activations they are: "teacher", "student"
Example = tuple[Batch, Target, Inputs]  # arguments of Student.step


def _say_nothing(kind: str, line: str, **data: Any) -> None:
    pass


def _nothing(layer: Layer) -> Left:
    return {}


@dataclass(frozen=True)
class Training:
    """How layers learn: the plan, the recipe's `distill:`, and for how many steps.

    `floor` is what every token of an embedding counts for at least; with `spare_device` originals wait on the host.
    `dtype` is the type of the checkpoint; `holdout` says whether batches are held out; `originals` watches what the
    original puts out; `tell` takes an event (its kind, a line for the user, and more); `left_of` gives what is left of
    a layer's weights that lose neurons.
    """

    plan: Plan
    distill: Distill
    floor: float
    device: Device
    total_steps: int
    spare_device: bool = False
    dtype: torch.dtype = torch.float32
    holdout: bool = False
    originals: Originals = field(default_factory=Originals)
    tell: Callable[..., None] = _say_nothing
    left_of: Callable[[Layer], Left] = _nothing

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


def mean_loss(losses: Iterable[tuple[Tensor, int]]) -> float:
    """The mean of losses of so many tokens each; a device is waited for once, when all are there."""
    values, tokens = [], []
    for loss, count in losses:
        values.append(loss)
        tokens.append(count)
    read = torch.stack(values).tolist() if values else []
    return sum((loss * count for loss, count in zip(read, tokens)), 0.0) / max(sum(tokens), 1)


class Finished(NamedTuple):
    """A layer that has learned: the module, in the plan's storage, and its tensors to be stored, named inside it.

    `dense` are the weights that no factors can stand for, each with the reason; their tensors are there all the same.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    dense: dict[str, str]


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
        left = training.left_of(at.layer)
        self.module = build_layer(at.layer, at.teacher, self.plan, self._storage_that_learns(), left)
        self.owner = owner
        self.follower: Student | None = None
        for weight in self.plan.planned(at.layer):
            if not weight.tied:
                swap.set_factors(self.module, relative(weight, at.layer), weight.kind, *init[weight.name])
        self.vocabulary = self._watch_vocabulary(at) if at.layer.kind == "embedding" else None
        self.trained = self._find_trained() if owner is None else {}
        if owner is None:
            self.optimizer = self._make_optimizer()
        else:
            swap.tie(self.module, owner.module)
            owner.follower, self.optimizer = self, owner.optimizer
        self.objective: Callable[..., Tensor] = OBJECTIVES.get(self.distill.objective)
        self.loss: Callable[..., Tensor] = LOSSES.get(self.distill.loss)
        self.streams = [parameter.name.removeprefix("on_") for parameter in parameters(self.loss)]
        self.steps = 0
        self.log = LossLog(at.layer.name, self.distill, self.device.device, training.originals.read)
        self.best = Best(best_file)
        self.initial = Best(best_file and best_file.with_suffix(".initial"))
        if owner is None and self._keeps_initial():
            self.initial.keep(self.trained)
        self.recoveries = 0
        self.spoilt = False  # a step of a tied pair that must not be taken
        self.best_loss = self._last_loss = math.inf
        self.best_together = math.inf  # of an embedding and the head tied to it
        self.first_loss = math.nan

    def _storage_that_learns(self) -> str:
        return get_storage(self.plan.storage).trained_as or self.plan.storage

    def _keeps_initial(self) -> bool:
        """Whether the starting state may be wanted when the best one is another, or none is."""
        return not self.training.holdout or torch.finfo(self.training.dtype).max < 1e30

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.trained.values(),
            lr=self.distill.learning_rate,
            weight_decay=self.distill.weight_decay,
            fused=self.device.device.type in FUSED,
        )

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

    def measure(self, batch: Batch, target: Target, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, outputs by stream) of one batch; `inputs` holds the streams the loss wants. A head has no outputs.

        Where processes have some rows each, the loss is that of all rows, and its gradient these rows' part.
        """
        share = batch.calls[self.position].share
        if isinstance(target, HeadTarget):
            entering = {name: inputs[name] for name in self.streams}
            found = head_distances(self.module, entering, target, self.objective)
            return self.loss(**of_all_rows({f"on_{name}": one for name, one in found.items()}, share)), {}
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
            distance = token_mean(
                self.objective(outputs[name].float(), target.float()), batch.calls[self.position].loss_mask
            )
            if self.vocabulary:
                # Checks are made on the same tokens every time.
                seed = self.steps + 1 if torch.is_grad_enabled() else 0
                distance = self.vocabulary.add_to(distance, self.module, self.objective, batch.tokens, seed)
            distances[f"on_{name}"] = distance
        return self.loss(**of_all_rows(distances, share)), outputs

    def step(self, batch: Batch, target: Target, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """One update; returns the loss and the outputs before it, detached.

        Where the loss or the gradient is not finite no step is taken but one back (`_go_back`): at once on a CPU,
        elsewhere within the few steps for which numbers stay on the device (LossLog).
        """
        leader = self.owner or self
        if leader.stopped:
            with torch.no_grad():
                loss, outputs = self.measure(batch, target, inputs)
            self.steps += 1
            return loss, outputs
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate(self.steps) * SLOWER**leader.recoveries
        loss, outputs = self.measure(batch, target, inputs)
        loss.backward()
        complete = self.follower is None  # else the head's gradient is still to come
        if complete:
            ranks.sum_gradients_(leader.trained.values())
        if self.look(loss.detach(), leader._limit_gradient() if complete else None):
            leader.spoilt = True
        if complete:
            if not leader.spoilt:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            leader.spoilt = False
        self.steps += 1
        return loss.detach(), {name: output.detach() for name, output in outputs.items()}

    def _limit_gradient(self) -> Tensor:
        """The norm of the gradient, which is clipped where the recipe says so."""
        if self.distill.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self.trained.values(), self.distill.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])

    @property
    def stopped(self) -> bool:
        """Whether the layer does not learn any more."""
        return self.recoveries > RETRIES

    def look(self, loss: Tensor | None = None, norm: Tensor | None = None) -> bool:
        """Look at the losses that wait, or at one more; whether one was bad, after which the layer went back."""
        try:
            if loss is None:
                self.log.read()
            else:
                self.log.add(self.steps + 1, loss, norm)
        except DistillationError as error:
            (self.owner or self)._go_back(error)
            return True
        return False

    def _go_back(self, error: DistillationError) -> None:
        """Put the best state back, or the first, and learn more slowly from there; at last, learn no more."""
        kept = self.best or self.initial
        if not kept:
            raise error
        with torch.no_grad():
            named = ((n, t) for n, p in self.trained.items() for t in (p, p.grad) if t is not None)
            bad = next((name for name, tensor in named if not is_finite(tensor)), None)
            kept.put_back(self.trained)
        for one in (self, self.follower):
            if one:
                one.log.forget()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer = self._make_optimizer()
        if self.follower:
            self.follower.optimizer = self.optimizer
        self.recoveries += 1
        rate = 0.0 if self.stopped else self.distill.learning_rate * SLOWER**self.recoveries
        to = "best" if self.best else "first"
        onwards = "it learns no more" if self.stopped else f"it goes on with a learning rate of {rate:g}"
        line = f"{error.where}: {error.what}{f' ({bad})' if bad else ''}: back to the {to} state, {onwards}"
        said = {"layer": error.where, "step": self.steps, "reason": error.what, "rate": rate}
        self.training.tell("recovered", line, **said, **({"weight": bad} if bad else {}))

    @torch.no_grad()
    def average(self, held: Iterable[Example]) -> float:
        """The mean loss over batches now."""
        return mean_loss((self.measure(batch, to, given)[0], batch.tokens) for batch, to, given in held)

    def check(self, held: Iterable[Example]) -> float:
        """The held-out loss now; remembers the state when it is the best so far."""
        return self.note_held_out(self.average(held))

    def note_held_out(self, loss: float) -> float:
        """Take note of a held-out loss of the present state, and keep the state if it is the best; returns the loss."""
        leader = self.owner or self
        if self.owner and self.steps and math.isinf(self.owner._last_loss):
            return loss  # the pair has left that state just now
        if not self.look():
            if math.isfinite(loss) or leader.stopped or not self.steps:
                self._note(loss)
                return loss
            what = f"the held-out loss became {loss} at step {self.steps}"
            leader._go_back(DistillationError(what, where=self.layer.name))
        leader._last_loss = math.inf
        return loss

    def _note(self, loss: float) -> None:
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

    def finish(self) -> Finished:
        """Put the best state back and the factors into the plan's storage; what is to be stored of the layer.

        That is the factor modules, and every other parameter that was trained. This is the last that is asked of a
        student. Nothing is returned that is not finite in the checkpoint's type, but for weights listed as `dense`.
        """
        self.look()
        if self.owner is not None:  # which was finished before: its factors are this one's, under its own name
            indices = get_storage(self.plan.storage).indices
            return Finished(self.module, {name: self.owner.module.get_buffer(name) for name in indices}, {})
        if self.best:
            self.best.restore(self.trained)
        if self._unfit() and self.initial:
            self.initial.put_back(self.trained)
            self.best_loss = self.first_loss
            reason = "what it learned is not finite in the type of the checkpoint"
            line = f"{self.layer.name}: {reason}: its starting factors are kept"
            self.training.tell("kept_initial", line, layer=self.layer.name, reason=reason)
        dense = self._unfit()
        self.discard()
        if self.vocabulary:
            self.vocabulary.finish(cast(LowRankEmbedding, self.module))
        for weight in self.plan.planned(self.layer):
            if weight.name not in dense:
                path = relative(weight, self.layer)
                self.module = swap.store_as(self.module, path, weight.kind, self.plan.storage)
                if not stored_fit(self.module, path, weight.kind, self.training.dtype):
                    dense[weight.name] = f"what it learned is not finite in {self.plan.storage}"
        return Finished(self.module, tensors_of(self.module, self.trained), dense)

    def discard(self) -> None:
        """Drop the states that are kept."""
        self.best.drop()
        self.initial.drop()

    def _unfit(self) -> dict[str, str]:
        return find_unfit(self.module, self.layer, self.plan, self.trained, self.training.dtype)
