"""What `quantize` chose for every kind of weight, as a table."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from lillama.report import shapes
from lillama.report.record import RunRecord, by_kind
from lillama.report.words import number


def rows(record: RunRecord) -> list[dict[str, str]]:
    """A row for each kind of weight: its forms, its bits, and the loss that the moments foretell, in nats per token."""
    if "quantized" not in record.metrics:
        return []
    chosen = _chosen(record)
    known = {row["weight"]: row for row in record.plan["weights"]}
    kinds = by_kind(known[name] for name in chosen if name in known)
    groups = {kind: [str(row["weight"]) for row in found] for kind, found in kinds.items()}
    groups |= {_numberless(name): [name] for name in chosen if name not in known}  # an end that the plan does not list
    return [{"kind": kind, **_row([chosen[name] for name in names])} for kind, names in groups.items()]


def _chosen(record: RunRecord) -> dict[str, dict[str, Any]]:
    """The events of the last time that the step was done, by weight."""
    found: dict[str, dict[str, Any]] = {}
    for event in record.events:
        if event["event"] == "quantise":
            found = {}
        elif event["event"] == "quantized" and isinstance(event.get("weight"), str):
            found[event["weight"]] = event
    return found


def _row(events: list[dict[str, Any]]) -> dict[str, str]:
    forms: Counter[str] = Counter()
    bits: set[str] = set()
    for event in events:
        form, *how = str(event.get("storage") or "").split(":")
        forms[form or "not in few bits"] += 1
        if len(how) == 2:
            bits.add(f"{how[0]} in groups of {how[1]}")
    losses = [event["loss"] for event in events if shapes.number(event.get("loss"))]
    return {
        "forms": ", ".join(f"{count} x {form}" for form, count in forms.most_common()),
        "bits": ", ".join(sorted(bits)),
        "loss": number(sum(losses)) if losses else "",
    }


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
