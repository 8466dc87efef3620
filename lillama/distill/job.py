"""What a schedule works on: the walk through the original, the plan, the data, and where finished layers go."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lillama.base import ranks
from lillama.base.device import Device
from lillama.base.progress import Progress
from lillama.base.rundir import RunDirectory
from lillama.contract import Layer
from lillama.distill import kept
from lillama.distill.build import Left, without
from lillama.distill.student import Student, Training
from lillama.errors import LillamaError
from lillama.factorise.start import Initialiser, Needs, find_needs
from lillama.factorise.statistics import Statistics, read_narrow
from lillama.plan.plan import Plan
from lillama.pretrained.calls import Batches, RawBatch
from lillama.pretrained.source import Source
from lillama.pretrained.streams import Place, budgets
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Recipe

EMBEDDING = "embedding.json"  # the error of an embedding's vectors, by how often tokens occur

OpenAt = Callable[[int], AbstractContextManager[nn.Module]]  # the original layer at a position, while the block lasts


class Watch(Protocol):
    """What may look on while layers learn (run/curve.py); it changes nothing."""

    def after_step(self, job: Job, step: int, open_at: OpenAt, students: Mapping[int, Student]) -> None:
        """The concurrent schedule has done `step` steps (0: none yet)."""

    def after_layer(self, job: Job, done: int) -> None:
        """The sequential schedule has finished the first `done` layers."""


@dataclass
class Job:
    """All that a schedule needs; what is derived is declared below, and made once."""

    recipe: Recipe
    plan: Plan
    source: Source
    device: Device
    directory: RunDirectory
    progress: Progress
    batches: Batches
    layers: Sequence[Layer] = field(init=False)  # the stream's, up to the last planned one
    train: Batches = field(init=False)
    held: Batches = field(init=False)  # out of training, to choose the best state
    total_steps: int = field(init=False)  # of every layer
    needs: Needs = field(init=False)
    walk: Walk = field(init=False)
    statistics: Statistics = field(init=False)
    training: Training = field(init=False)
    initialise: Initialiser = field(init=False)

    def __post_init__(self) -> None:
        self.plan = kept.apply(self.plan, self.directory)
        recipe, plan = self.recipe, self.plan
        self.layers = plan.work
        # The last batches are held out: batches are in shuffled order already.
        cut = len(self.batches) - self._count_held()
        self.train, self.held = self.batches[:cut], self.batches[cut:]
        self.total_steps = len(self.train) * recipe.distill.epochs
        self.needs = find_needs(recipe)
        self.walk = Walk(self.source, self.layers, plan.layers, self.device, self.progress)
        floor, spare = recipe.compress.embedding_floor, recipe.run.low_memory
        self.statistics = Statistics(plan, self.directory, self.device, self.train, self.needs.fisher, floor)
        self.training = Training(
            plan, recipe.distill, floor, self.device, self.total_steps, spare,
            self.source.dtype, bool(self.held), self.walk.originals, self.tell, self.left_of,
        )  # fmt: skip
        self.initialise = Initialiser.of(recipe, self.source.dtype)

    def _count_held(self) -> int:
        share, count = self.recipe.distill.holdout, len(self.batches)
        return max(round(count * share), 1) if share and count > 1 else round(count * share)

    @property
    def ordered(self) -> list[RawBatch]:
        """All batches, those to train on first."""
        return [*self.train, *self.held]

    @property
    def first_batches(self) -> range:
        """The numbers, in `ordered`, of the batches on which layers are measured before they learn."""
        n = len(self.train)
        return range(n, len(self.batches)) if self.held else range(min(n, 1))

    def left_of(self, layer: Layer) -> Left:
        """What is left of the layer's weights that lose neurons."""
        return read_narrow(self.directory, layer)

    def read_stored(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a finished layer, on the device; those of a tied head with the embedding's factors."""
        tied = {weight.tied for weight in self.plan.planned(layer)}
        owners = [other for other in self.plan.layers if any(w.name in tied for w in other.weights)]
        tensors: dict[str, Tensor] = {}
        for one in (*owners, layer):
            tensors |= self.directory.tensors(self.file(one))
        return {name: value.to(self.device.device) for name, value in tensors.items()}

    def tied_head(self, layer: Layer) -> int | None:
        """The position of the head whose factors are those of the embedding `layer`."""
        uses = [use for weight in self.plan.planned(layer) for use in self.plan.uses(weight)]
        return uses[0][0] if uses else None

    def is_stored(self, layer: Layer) -> bool:
        """Whether the layer is finished; an embedding and the head that is tied to it are so together."""
        group = {layer.name: layer}
        for weight in self.plan.planned(layer):
            group |= {one.name: one for one in self.plan.layers for w in one.weights if w.name == weight.tied}
        head = self.tied_head(layer)
        group |= {} if head is None else {self.plan.layers[head].name: self.plan.layers[head]}
        return all(self.directory.has(self.file(one)) for one in group.values())

    @property
    def is_done(self) -> bool:
        """Whether every planned layer is finished."""
        return all(self.is_stored(layer) for layer in self.layers if self.plan.changes(layer))

    def check_steps(self) -> set[int]:
        """After which steps the held-out loss is measured: evenly spaced, the last step included."""
        checks = self.recipe.distill.checks
        return {round(self.total_steps * (i + 1) / checks) for i in range(checks)} - {0}

    def file(self, layer: Layer) -> str:
        """Where a finished layer is stored."""
        return f"layers/{self.plan.layers.index(layer):04d}-{layer.name}.safetensors"

    def best_file(self, position: int) -> Path | None:
        """Where the best state of a layer is kept while it learns; None: in memory."""
        if not self.recipe.run.low_memory:
            return None
        own = f".{ranks.rank()}" if ranks.world() > 1 else ""
        return self.directory.path / f"best.{position:04d}{own}.safetensors"

    def choose_place(self) -> Place:
        """Where streams have room: three are in use while a layer learns from the student's inputs, else two."""
        copies = 3 if "student" in self.needs.streams else 2
        run = self.recipe.run
        room = budgets(run.stream_device_memory, run.stream_memory, self.device.device)
        return self.walk.choose_place(self.batches, copies, room)

    def tell(self, kind: str, line: str, **data: Any) -> None:
        """Write an event, and say it to the user."""
        self.directory.event(kind, **data)
        self.progress.say(line)

    def keep_dense(self, layer: Layer, reasons: Mapping[str, str]) -> None:
        """Go on with a plan in which weights of `layer` stay dense, each for a reason.

        That is on disk before anything depends on it.
        """
        self.directory.put_json(kept.next_file(self.plan, layer, self.directory), reasons)
        self._take_over(reasons)

    def keep_refused(self, layer: Layer) -> None:
        """Keep the weights of `layer` dense that the initialiser had no use for."""
        names = [weight.name for weight in self.plan.planned(layer) if weight.name in self.initialise.refused]
        if names:
            self.keep_dense(layer, {name: self.initialise.refused.pop(name) for name in names})

    def keep_unless_finite(self, layer: Layer, loss: float) -> bool:
        """Keep all weights of `layer` dense where its first loss is not finite; whether that is so."""
        self.walk.originals.read()
        if math.isfinite(loss):
            return False
        reason = f"with starting factors the layer's loss is {loss}"
        if self.plan.narrowed(layer):  # the original's weights are no way back
            hint = "Set compress.neurons: null, or run.compute: float32."
            raise LillamaError(f"neurons of its MLP were removed, and {reason}", where=layer.name, hint=hint)
        self.keep_dense(layer, {weight.name: reason for weight in self.plan.planned(layer)})
        return True

    def _take_over(self, reasons: Mapping[str, str]) -> None:
        before, self.plan = self.plan, self.plan.keep_dense(reasons)
        self.statistics = replace(self.statistics, plan=self.plan)
        self.training = replace(self.training, plan=self.plan)
        for weight in self.plan.kept.keys() - before.kept.keys():
            reason = self.plan.kept[weight]
            self.tell("kept_dense", f"{weight} stays dense: {reason}", weight=weight, reason=reason)

    @contextlib.contextmanager
    def original(self, layer: Layer) -> Iterator[nn.Module]:
        """The layer as pretrained, which is read where it is not in memory."""
        module = self.source.model.get_submodule(layer.name)
        if all(parameter.is_meta for parameter in module.parameters()):
            with self.walk.open_layer(layer) as module:
                yield module
        else:
            yield module

    def store(self, *students: Student) -> list[nn.Module]:
        """Store finished layers, all of them or none, and say how well each learned; the modules."""
        done = [(student, student.finish()) for student in students]
        reasons = {name: reason for _, found in done for name, reason in found.dense.items()}
        plan = self.plan.keep_dense(reasons)
        modules, finished = [], {}
        for student, found in done:
            layer, module, tensors = student.layer, found.module, found.tensors
            if plan.planned(layer) != self.plan.planned(layer):
                with self.original(layer) as teacher:
                    module, tensors = without(layer, teacher, plan, module, student.trained, self.left_of(layer))
            modules.append(module)
            finished[layer] = tensors
        self.put_finished(finished, {student.layer: found.dense for student, found in done if found.dense})
        for student in students:
            if self.plan.changes(student.layer):
                self._tell_learned(student)
        return modules

    def put_finished(
        self, finished: Mapping[Layer, dict[str, Tensor]], decided: Mapping[Layer, Mapping[str, str]]
    ) -> None:
        """Store finished layers, and what is kept dense of them, at once; go on with the plan that this makes."""
        reasons = {name: reason for dense in decided.values() for name, reason in dense.items()}
        plan = self.plan.keep_dense(reasons) if reasons else self.plan
        files = {self.file(layer): tensors for layer, tensors in finished.items() if plan.changes(layer)}
        said = {kept.next_file(self.plan, layer, self.directory): reasons for layer, reasons in decided.items()}
        self.directory.put_files(files, said)
        if reasons:
            self._take_over(reasons)

    def _tell_learned(self, student: Student) -> None:
        self.directory.event(
            "layer",
            layer=student.layer.name,
            steps=student.steps,
            initial_loss=student.first_loss,
            loss=student.best_loss if math.isfinite(student.best_loss) else None,  # none was measured
        )
        if student.vocabulary:
            report = student.vocabulary.report(self.statistics.counts)
            self.directory.put_json(EMBEDDING, report)
            self.directory.event("embedding", layer=student.layer.name, **report)
