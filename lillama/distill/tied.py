"""An embedding and the head that is tied to it, distilled as one in the sequential schedule.

One set of factors serves both, so they learn together: the embedding from the token ids, the head from the teacher's
final hidden states. The student's own are not there yet, for everything between the two depends on the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lillama.base.progress import Bar
from lillama.distill.job import Job
from lillama.distill.student import Example, Student
from lillama.factorise.grams import Grams
from lillama.factorise.known import Known
from lillama.factorise.start import initial_factors
from lillama.pretrained.streams import Stream
from lillama.pretrained.walk import HeadTargets, LayerPass

Pair = Callable[[int], tuple[Example, Example]]  # of batch i: the embedding's and the head's


def distill_tied(job: Job, low: LayerPass, head: int, final: Stream, bar: Bar) -> nn.Module:
    """Initialise, train and store an embedding and the head at position `head`; returns the embedding.

    `low` is the embedding's pass, its targets the teacher's vectors; `final` are the teacher's final hidden states.
    """
    ids, vectors = low.inputs["teacher"], low.targets
    assert vectors is not None
    with job.walk.open_layer(job.layers[head]) as head_teacher:
        high = LayerPass(job.layers[head], head, head_teacher, low.batches, {"teacher": final, "student": final})
        targets = high.targets = HeadTargets(high, final, job.walk)
        init = initial_factors(low, job.plan, job.initialise, _gather_statistics(job, low, high, final))
        job.keep_refused(low.layer)
        if not job.plan.planned(low.layer):
            bar.skip(job.total_steps or 1)
            return low.teacher
        student = Student(low, job.training, init)
        follower = Student(high, job.training, {}, owner=student)

        def pair(i: int) -> tuple[Example, Example]:
            here, there = ids[i], final[i]
            return (
                (low.batches[i], vectors[i], dict.fromkeys(student.streams, here)),
                (high.batches[i], targets[i], dict.fromkeys(follower.streams, there)),
            )

        if job.total_steps and not _begin(job, student, follower, pair):
            bar.skip(job.total_steps)
            return low.teacher
        _train(job, student, follower, pair, bar)
        return job.store(student, follower)[0]


def _gather_statistics(job: Job, low: LayerPass, high: LayerPass, final: Stream) -> Known | None:
    """Token counts, and the Gram of the head's inputs, where the initialiser wants statistics."""
    if not job.needs.grams:
        return job.statistics.complete(low.layer, None)
    limit = job.recipe.compress.gram_tokens
    listener = Grams(high.layer.name, high.teacher, job.plan.chosen(high.layer), limit, {"gram"})
    with job.device.autocast():
        listener.add(high.batches, final, high.position)
    return job.statistics.complete(low.layer, listener.close())


def _begin(job: Job, student: Student, follower: Student, pair: Pair) -> bool:
    """Measure the first losses; whether they are finite, so that there is something to learn from."""
    first = job.first_batches
    low = student.average(pair(i)[0] for i in first)
    high = follower.average(pair(i)[1] for i in first)
    if job.keep_unless_finite(student.layer, low + high):
        student.discard()
        return False
    if job.held:
        student.note_held_out(low)
        follower.note_held_out(high)
    return True


def _train(job: Job, student: Student, follower: Student, pair: Pair, bar: Bar) -> None:
    """Both in step: an update needs the gradients of both, and the best state is the best of their sum."""
    n = len(job.train)
    # Where nothing learns, streams hold what the initialiser wanted and no more: there is no held-out batch in them.
    total = len(job.batches) if job.total_steps else n

    def check() -> float:
        low = student.check(pair(i)[0] for i in range(n, total))
        return low + follower.check(pair(i)[1] for i in range(n, total))

    checks = job.check_steps()
    with torch.enable_grad():
        for step in range(1, job.total_steps + 1):
            if student.stopped:
                bar.skip(job.total_steps - step + 1)
                break
            low, high = pair((step - 1) % n)
            loss = student.step(*low)[0] + follower.step(*high)[0]
            bar.advance(tokens=low[0].tokens, loss=loss)
            if step in checks and n < total:
                job.directory.event("check", layer=student.layer.name, step=step, held_out_loss=check())
    if not job.total_steps:
        bar.advance()
