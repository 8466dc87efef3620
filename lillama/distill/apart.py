"""Layers that no other has an influence on, because nothing is trained and no stream is wanted: each process has some.

Where starting factors are the result and rest on the Fisher information alone, layers are factorised in any order: the
processes of a run take them in turn, and the first writes what all of them made. With one process, and for an embedding
or a head, the sequential schedule does the same work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lillama.base import memory, ranks
from lillama.contract import Layer
from lillama.distill.build import without
from lillama.distill.job import Job
from lillama.distill.student import Student
from lillama.factorise.start import initial_factors
from lillama.pretrained.walk import LayerPass


@dataclass
class _Made:
    """A finished layer, or what stays dense of it and why: `refused` before it was put into storage, `dense` after."""

    refused: dict[str, str]
    dense: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def stand_apart(job: Job) -> bool:
    """Whether several processes can finish the layers of `job` apart from each other."""
    return ranks.world() > 1 and not job.total_steps and not job.needs.grams


@torch.no_grad()
def finish_apart(job: Job) -> None:
    """Factorise and store every planned block that is not stored yet; all processes call it."""
    wanted = [x for x in job.layers if x.kind == "block" and job.plan.changes(x) and not job.is_stored(x)]
    with job.progress.phase("factorise", len(wanted)) as bar:
        for start in range(0, len(wanted), ranks.world()):
            some = wanted[start : start + ranks.world()]
            made = None
            if ranks.rank() < len(some):
                bar.describe(some[ranks.rank()].name)
                layer = some[ranks.rank()]
                with ranks.alone():
                    made = _make(job, layer)
            tensors = ranks.collect(made.tensors if made else None)
            known = ranks.gather(replace(made, tensors={}) if made else None)
            for number, (layer, one) in enumerate(zip(some, known)):
                if one is not None:
                    _store(job, layer, one, (tensors[number] or {}) if tensors else {})
            memory.give_back()
            bar.advance(len(some))


def _make(job: Job, layer: Layer) -> _Made:
    """Factorise one layer, and put it into the plan's storage."""
    position = job.layers.index(layer)
    with job.walk.open_layer(layer) as teacher:
        at = LayerPass(layer, position, teacher, (), {})
        init = initial_factors(at, job.plan, job.initialise, job.statistics.complete(layer, None))
        names = [weight.name for weight in job.plan.planned(layer) if weight.name in job.initialise.refused]
        made = _Made({name: job.initialise.refused.pop(name) for name in names})
        plan = job.plan.keep_dense(made.refused)
        if not plan.changes(layer):
            return made

        def tell(kind: str, line: str, **data: Any) -> None:
            made.told.append((kind, line, data))

        student = Student(at, replace(job.training, plan=plan, tell=tell), init, job.best_file(position))
        found = student.finish()
        made.dense, made.tensors = found.dense, found.tensors
        if found.dense:
            kept, left = plan.keep_dense(found.dense), job.left_of(layer)
            _, made.tensors = without(layer, teacher, kept, found.module, student.trained, left)
        made.tensors = {name: tensor.cpu() for name, tensor in made.tensors.items()}
    return made


def _store(job: Job, layer: Layer, made: _Made, tensors: dict[str, Tensor]) -> None:
    """Write a layer that one of the processes made (the first has its tensors), and go on with what stays dense."""
    for kind, line, data in made.told:
        job.tell(kind, line, **data)
    if made.refused:
        job.keep_dense(layer, made.refused)
    job.put_finished({layer: tensors}, {layer: made.dense} if made.dense else {})
    if job.plan.changes(layer):
        job.directory.event("layer", layer=layer.name, steps=0, initial_loss=math.nan, loss=None)
