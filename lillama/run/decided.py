"""What an earlier process of a run decided by what it measured: the ranks and bits of a plan that leaves them open."""

from __future__ import annotations

from dataclasses import replace

from lillama.base.rundir import MODEL, RunDirectory
from lillama.errors import LillamaError
from lillama.plan.neurons import narrow_layers
from lillama.plan.plan import Plan

PLAN = "plan.json"
FORMS = "forms.json"  # the storages in few bits of a plan in bytes, once more: no checkpoint in full knows them


def write(plan: Plan, directory: RunDirectory) -> None:
    """Leave a plan that is settled where `apply` finds it."""
    if plan.budget is not None:
        directory.put_json(FORMS, dict(plan.forms))
    directory.put_json(PLAN, plan.to_dict())


def apply(plan: Plan, directory: RunDirectory) -> Plan:
    """The plan, with the ranks that were chosen where it leaves them open, and why some weights have none."""
    if not plan.provisional:
        return plan
    kept: dict[str, str] = {}
    if directory.has(PLAN):
        held = directory.json(PLAN)
        if held.get("provisional"):
            return plan
        ranks = {row["weight"]: row["rank"] for row in held["weights"] if row["rank"] is not None}
        left = {row["weight"]: row["left"] for row in held["weights"] if "left" in row}
        kept = {row["weight"]: row["kept_dense"] for row in held["weights"] if "kept_dense" in row}
    elif directory.has(f"{MODEL}/config.json"):  # the plan was damaged since: the checkpoint knows its ranks
        said = directory.json(f"{MODEL}/config.json")["quantization_config"]
        ranks = {name: how["rank"] for name, how in said["modules"].items()}
        left = said.get("shapes", {})
    else:
        return plan
    layers = tuple(narrow_layers(plan.layers, {name: (shape[0], shape[1]) for name, shape in left.items()}))
    plan = replace(plan, layers=layers)
    if plan.budget is None:
        return replace(plan, ranks=ranks, kept=kept, provisional=False)
    return replace(plan, ranks=ranks, kept=kept, forms=_forms(directory), provisional=False)


def _forms(directory: RunDirectory) -> dict[str, str]:
    if directory.has(FORMS):
        return dict(directory.json(FORMS))
    if directory.has(PLAN):
        return {row["weight"]: row["form"] for row in directory.json(PLAN)["weights"] if "form" in row}
    raise LillamaError(
        "what was decided of the weights' bits is lost",
        where=str(directory.path / FORMS),
        hint="Run the recipe again with --restart.",
    )
