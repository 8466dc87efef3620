"""What an earlier process of a run decided by what it measured: the ranks of a plan that leaves them open."""

from __future__ import annotations

from dataclasses import replace

from lillama.base.rundir import MODEL, RunDirectory
from lillama.plan.plan import Plan

PLAN = "plan.json"


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
        kept = {row["weight"]: row["kept_dense"] for row in held["weights"] if "kept_dense" in row}
    elif directory.has(f"{MODEL}/config.json"):  # the plan was damaged since: the checkpoint knows its ranks
        modules = directory.json(f"{MODEL}/config.json")["quantization_config"]["modules"]
        ranks = {name: how["rank"] for name, how in modules.items()}
    else:
        return plan
    return replace(plan, ranks=ranks, kept=kept, provisional=False)
