"""An embedding and the head that is tied to it, distilled as one in the sequential schedule.

One pair of factors serves both, so they learn together: the embedding from the token ids, the head from the teacher's
final hidden states. The student's own are not there yet, for everything between the two depends on the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lillama.base.progress import Bar
from lillama.contract import Layer
from lillama.distill.job import Job, Targets
from lillama.distill.student import Student
from lillama.factorise import start
from lillama.factorise.grams import Found, Grams
from lillama.pretrained.calls import Batch
from lillama.pretrained.streams import Stream

Example = tuple[Batch, Tensor, dict[str, Tensor]]  # arguments of Student.step
Pair = Callable[[int], tuple[Example, Example]]  # of batch i: the embedding's and the head's


def distill_tied(
    job: Job,
    layer: Layer,
    teacher: nn.Module,
    batches: list[Batch],
    streams: tuple[Stream, Stream, Stream],
    head: int,
    bar: Bar,
) -> nn.Module:
    """Initialise, train and store the embedding `layer` and the head at position `head`; returns the embedding.

    `streams`: the token ids, the teacher's vectors for them, the teacher's final hidden states.
    """
    ids, vectors, final = streams
    top = job.layers[head]
    with job.teacher(top) as head_teacher:
        init = start.initial_factors(
            layer, teacher, job.plan, job.recipe, _statistics(job, layer, head_teacher, batches, final, head)
        )
        place = job.layers.index(layer)
        student = Student(layer, place, teacher, job.plan, job.recipe, job.device, init, job.total_steps)
        follower = Student(
            top, head, head_teacher, job.plan, job.recipe, job.device, {}, job.total_steps, owner=student
        )
        targets = Targets(job, head_teacher, head, batches, final)

        def pair(i: int) -> tuple[Example, Example]:
            low, high = ids[i], final[i]
            return (
                (batches[i], vectors[i], dict.fromkeys(student.wants, low)),
                (batches[i], targets[i], dict.fromkeys(follower.wants, high)),
            )

        _train(job, student, follower, pair, bar)
        job.store(student)
        job.store(follower)
    return student.module


def _statistics(
    job: Job, layer: Layer, head: nn.Module, batches: list[Batch], final: Stream, position: int
) -> Found | None:
    """Token counts, and the Gram of the head's inputs, where the initialiser wants statistics."""
    if not job.grams:
        return job.statistics(layer, None)
    top = job.layers[position]
    listener = Grams(top.name, head, job.plan.planned(top), job.recipe.compress.gram_tokens, {"gram"})
    with job.device.autocast():
        listener.add(batches, final, position)
    return job.statistics(layer, listener.close())


def _train(job: Job, student: Student, follower: Student, pair: Pair, bar: Bar) -> None:
    """Both in step: an update needs the gradients of both, and the best state is the best of their sum."""
    n = len(job.train)
    total = len(job.batches) if job.total_steps else n  # where nothing learns, streams may be shorter

    def check() -> float:
        low = student.check(pair(i)[0] for i in range(n, total))
        return low + follower.check(pair(i)[1] for i in range(n, total))

    checks = job.check_steps()
    with torch.enable_grad():
        if n < total:
            check()
        for step in range(1, job.total_steps + 1):
            low, high = pair((step - 1) % n)
            loss = student.step(*low)[0] + follower.step(*high)[0]
            bar.advance(tokens=low[0].tokens, loss=loss)
            if step in checks and n < total:
                job.directory.event("check", layer=student.layer.name, step=step, held_out_loss=check())
    if not job.total_steps:
        bar.advance()
