"""The sequential schedule: layers outside, batches inside.

A layer is initialised from its real inputs, distilled, stored and freed, then both streams advance. Only one layer's
weights and optimiser state are ever on the device. Streams are made and dropped here alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lillama.base import memory, ranks
from lillama.base.progress import Bar
from lillama.distill.apart import finish_apart, stand_apart
from lillama.distill.build import restore_layer
from lillama.distill.job import Job, Watch
from lillama.distill.student import Example, Student
from lillama.distill.tied import distill_tied
from lillama.factorise.grams import Grams
from lillama.factorise.refit import refit_layer
from lillama.factorise.start import initial_factors
from lillama.lowrank.storage import Factors
from lillama.pretrained.calls import Batch
from lillama.pretrained.streams import Shelf, Stream
from lillama.pretrained.walk import HeadTargets, LayerPass

Streams = dict[str, Stream]


def sequential(job: Job, watch: Watch | None = None) -> None:
    """Layers outside, batches inside."""
    if stand_apart(job):
        finish_apart(job)
    shelf = Shelf(job.directory.path / "streams", job.device.device, job.choose_place())
    start, streams = _resume(job, shelf)
    embedded = None if streams else shelf.new("0000-teacher")
    batches = job.walk.capture_batches(job.ordered, embedded, _tokens_needed(job))
    if embedded is not None:
        streams = {"teacher": embedded, "student": embedded}
    if watch and start == 0:
        watch.after_layer(job, 0)
    per_layer = job.total_steps or 1
    planned = [job.plan.changes(layer) for layer in job.layers]
    with job.progress.phase("distil", per_layer * sum(planned)) as bar, torch.no_grad():
        bar.unit = "tokens/s in this layer"
        bar.skip(per_layer * sum(planned[:start]))
        for position in range(start, len(job.layers)):
            if job.is_done:
                bar.skip(per_layer * sum(planned[position:]))
                if watch and position > start:
                    watch.after_layer(job, len(job.layers))
                break
            bar.describe(job.layers[position].name)
            streams = _Step(job, shelf, bar, batches, position).advance(streams)
            memory.give_back()
            if watch:
                watch.after_layer(job, position + 1)
    shelf.clear()


def _tokens_needed(job: Job) -> int | None:
    """How many tokens streams have to carry; None: all. Where nothing learns, what the initialiser wants to see."""
    if job.total_steps:
        return None
    return job.recipe.compress.gram_tokens if job.needs.grams else 0


def _resume(job: Job, shelf: Shelf) -> tuple[int, Streams]:
    """The layer to go on with and the streams that enter it, where an earlier process left them in files."""
    found = shelf.marked() if shelf.place == "file" else None
    if found is not None:
        position, streams = found
        done = (layer for layer in job.layers[:position] if job.plan.changes(layer))
        whole = all(len(stream) == len(job.batches) for stream in streams.values())
        if not whole or not all(job.is_stored(layer) for layer in done):
            found = None
    # All processes go on with the same layer, or from the beginning.
    everywhere = set(ranks.gather(found[0] if found else -1))
    if found is not None and len(everywhere) == 1:
        job.directory.event("resumed", layer=job.plan.layers[found[0]].name)
        return found
    shelf.clear_all()
    return 0, {}


class _Step:
    """The work on one layer: it reads the streams that enter, and makes those that leave."""

    def __init__(self, job: Job, shelf: Shelf, bar: Bar, batches: list[Batch], position: int) -> None:
        self.job, self.shelf, self.bar, self.batches, self.position = job, shelf, bar, batches, position
        self.layer = job.layers[position]
        self.is_last = position == len(job.layers) - 1

    def advance(self, streams: Streams) -> Streams:
        """Finish the layer; the streams that leave it (none after the last layer). Those that entered are dropped."""
        with self.job.walk.open_layer(self.layer) as teacher:
            self.job.walk.prefetch_after(self.position)
            after = self._work(LayerPass(self.layer, self.position, teacher, self.batches, streams))
        if after:
            self.shelf.mark(self.position + 1, after)
        for stream in set(streams.values()) - set(after.values()):
            stream.drop()
        return after

    def _work(self, at: LayerPass) -> Streams:
        job, layer = self.job, self.layer
        planned = job.plan.changes(layer)
        stored = planned and job.is_stored(layer)
        if self.is_last and (stored or not planned):  # the last is planned, unless it was kept dense just now
            self._skip()
            return {}
        if layer.kind == "head":
            at.targets = HeadTargets(at, at.inputs["teacher"], job.walk)
            self._distill(at)
            return {}
        after = {"teacher": self._run(at.teacher, at.inputs["teacher"], "teacher")}
        at.targets = after["teacher"]
        student: nn.Module | None = at.teacher if at.inputs["student"] is not at.inputs["teacher"] else None
        needs_student = "student" in job.needs.streams
        if stored:
            self._skip()
            student = None
            if needs_student:
                student = restore_layer(layer, at.teacher, job.plan, job.read_stored(layer), job.left_of(layer))
        elif planned:
            head = job.tied_head(layer)
            trained = self._distill(at) if head is None else self._distill_with(at, head)
            if self.is_last:
                after["teacher"].drop()
                return {}
            # Of a layer that is kept dense it is the original, as where none was planned.
            if trained is not at.teacher:
                student = trained if needs_student else None
        after["student"] = after["teacher"]
        if student is not None:
            after["student"] = self._run(student, at.inputs["student"], "student")
        return after

    def _skip(self) -> None:
        """The layer was finished by an earlier process, or does not learn."""
        self.bar.skip(self.job.total_steps or 1)

    def _run(self, module: nn.Module, stream: Stream, name: str) -> Stream:
        """The stream behind this layer, played by `module`."""
        out = self.shelf.new(f"{self.position + 1:04d}-{name}")
        return self.job.walk.run_through(module, self.position, self.batches, stream, out)

    def _distill_with(self, at: LayerPass, head: int) -> nn.Module:
        """Distil an embedding and the head that is tied to it; the embedding."""
        stream = entering = at.targets
        assert isinstance(entering, Stream)
        for position in range(self.position + 1, head):
            with self.job.walk.open_layer(self.job.layers[position]) as teacher:
                out = self.shelf.new(f"{position + 1:04d}-ahead")
                after = self.job.walk.run_through(teacher, position, self.batches, entering, out)
            if entering is not stream:
                entering.drop()
            entering = after
        trained = distill_tied(self.job, at, head, entering, self.bar)
        if entering is not stream:
            entering.drop()
        return trained

    def _distill(self, at: LayerPass) -> nn.Module:
        """Initialise, train and store the layer; returns it, finished, or the original where that is kept."""
        job = self.job
        init = start_layer(job, at)
        if not job.plan.changes(self.layer):
            self._skip()
            return at.teacher
        student = Student(at, job.training, init, job.best_file(self.position))
        if job.recipe.run.low_memory:
            memory.give_back()
        targets = at.targets
        assert targets is not None

        def example(i: int) -> Example:
            return at.batches[i], targets[i], {name: at.inputs[name][i] for name in student.streams}

        if first := [
            i for i in job.first_batches if i < len(at.batches)
        ]:  # streams may be shorter where nothing learns
            loss = student.average(map(example, first))
            if job.keep_unless_finite(self.layer, loss):
                student.discard()
                self._skip()
                return at.teacher
            if job.held:
                student.note_held_out(loss)
        self._train(student, example)
        return job.store(student)[0]

    def _train(self, student: Student, example: Callable[[int], Example]) -> None:
        job, bar = self.job, self.bar
        n, total, checks = len(job.train), len(job.batches), job.check_steps()
        with torch.enable_grad():
            for step in range(1, job.total_steps + 1):
                if student.stopped:
                    bar.skip(job.total_steps - step + 1)
                    break
                batch, target, inputs = example((step - 1) % n)
                loss, _ = student.step(batch, target, inputs)
                bar.advance(tokens=batch.tokens, loss=loss)
                if step in checks and n < total:
                    held = student.check(map(example, range(n, total)))
                    job.directory.event("check", layer=self.layer.name, step=step, held_out_loss=held)
        if not job.total_steps:
            bar.advance()


def start_layer(job: Job, at: LayerPass) -> dict[str, Factors]:
    """The starting factors of a layer, from the streams that enter it where they depend on them.

    Weights that the initialiser has no use for are kept dense.
    """
    found = _start_layer(job, at)
    job.keep_refused(at.layer)
    return found


def _start_layer(job: Job, at: LayerPass) -> dict[str, Factors]:
    limit = job.recipe.compress.gram_tokens
    if "cross" in job.needs.grams:
        with job.device.autocast():
            return refit_layer(at, job.plan, job.initialise, limit)
    grams = None
    if job.needs.grams:
        # Which matrices are summed must not depend on what was kept dense in the meantime.
        listener = Grams(at.layer.name, at.teacher, job.plan.chosen(at.layer), limit, job.needs.grams)
        with job.device.autocast():
            for name in sorted(job.needs.streams):
                listener.add(at.batches, at.inputs[name], at.position)
        grams = listener.close()
    return initial_factors(at, job.plan, job.initialise, job.statistics.complete(at.layer, grams))
