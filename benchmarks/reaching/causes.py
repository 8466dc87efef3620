"""Failures grouped by cause, with where they arose: what to mend first."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from reaching import page

STAGES = ("builds", "forward", "reloads", "plan", "full", "default", "streams")
# What differs between classes that fail alike: names of weights and folders, numbers.
_OWN = re.compile(r"/\S+|\b\d+(\.\d+)?e-\d+|[\w.]*\.\d+[\w.]*|\d+")


def grouped(findings: list[dict[str, Any]]) -> str:
    """Every cause with its classes and the innermost lines of the first one's traceback, the commonest first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for found in findings:
        for stage in STAGES:
            if (said := found.get(stage, "yes")) != "yes":
                groups[stage, _OWN.sub("#", said)[:120]].append(found)
    lines = [page.summary(findings)]
    for (stage, cause), members in sorted(groups.items(), key=lambda item: (STAGES.index(item[0][0]), -len(item[1]))):
        lines.append(f"\n{stage}: {cause} ({len(members)})")
        lines.append(f"    {', '.join(found['class'] for found in members)}")
        lines.append(f"    {members[0][stage]}")
        lines += [f"        {line}" for line in members[0].get("traces", {}).get(stage, [])[-6:]]
    return "\n".join(lines)
