"""The last step of a run: its result in few bits, `quantized/`, unless that was done before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lillama import host
from lillama.base.progress import Progress
from lillama.base.rundir import FINETUNED, MODEL, QUANTIZED, RunDirectory
from lillama.bits import stage
from lillama.bits.apply import Planned
from lillama.checkpoint.load import load
from lillama.finetune import train as finetune
from lillama.lowrank.counts import stored
from lillama.plan.plan import Plan
from lillama.recipe.schema import Recipe
from lillama.report.record import IN_TURN
from lillama.run.learn import around_rounding, learn
from lillama.run.prepare import Prepared


def refuse_other(directory: RunDirectory, recipe: Recipe) -> None:
    """LillamaError where a result in few bits is here that another section made of the same weights."""
    if recipe.quantize is not None:
        stage.finished(directory, recipe.quantize, stage.source_of(directory, recipe.finetune is not None))


def count(directory: RunDirectory, plan: Plan) -> int:
    """Unique parameters of the result in few bits: weights that took another form hold other numbers of them."""
    modules = directory.json(f"{QUANTIZED}/config.json")["quantization_config"]["modules"]
    now = {name: how["storage"] for name, how in modules.items()}
    return plan.after + sum(
        stored(plan.weights[name], rank, now.get(name, plan.storage)) - stored(plan.weights[name], rank, plan.storage)
        for name, rank in plan.ranks.items()
    )


def _planned(plan: Plan, progress: Progress) -> Planned | None:
    """What a plan in bytes says of the step; says where weights that had to stay dense made it larger than asked."""
    if plan.budget is None or plan.bytes is None:
        return None
    spare = plan.budget.most - plan.bytes
    if spare < 0:
        progress.say(f"weights that had to stay dense take {-spare:,} bytes more than compress.size allows")
    return Planned(plan.forms, max(spare, 0))


def quantise(
    prepared: Prepared,
    plan: Plan,
    directory: RunDirectory,
    progress: Progress,
    *,
    batches: list[dict[str, Tensor]],
    card: str,
) -> None:
    """Put the last checkpoint of a run into few bits; a result of other weights that is there goes.

    Says what became of each weight in events: "quantise", then "quantized" for every one of them.
    """
    recipe, section = prepared.recipe, prepared.recipe.quantize
    assert section is not None
    tuned = recipe.finetune is not None
    source = stage.source_of(directory, tuned)
    if stage.finished(directory, section, source):
        return
    # Of an earlier one. Before this one is there: a process that is killed in between measures once more.
    directory.forget(*filter(directory.has, ("evaluation.quantized.json", IN_TURN)))
    with progress.timed("quantize"):
        progress.say(f"putting the model into {' or '.join(map(str, section.widths))} bits")
        last = directory.path / (FINETUNED if tuned else MODEL)
        model = load(last, trust_remote_code=recipe.model.trust_remote_code, dtype=torch.float32)
        host.get().prepare(prepared.plugin, model, recipe)
        offered = [(weight.name, weight.kind) for layer in plan.layers for weight in layer.weights]
        given: Any = {"offered": offered, "batches": batches, "device": prepared.device, "progress": progress}
        done = stage.quantise_model(model, section, **given, plan=_planned(plan, progress))
        if section.steps:
            learn(prepared, model, around_rounding(model, recipe, section), directory, progress)
            stage.check_finite(model)
        directory.event("quantise", bits=section.bits, group_size=section.group_size)
        for choice in done:
            how = {"storage": choice.storage} | ({} if choice.loss is None else {"loss": choice.loss})
            directory.event("quantized", weight=choice.target.name, **how)
        dtype = prepared.source.dtype

        def save() -> None:
            stage.save(model, dtype, section, source=source, directory=directory, card=card)
            finetune.clear(directory)

        directory.by_first(save)
