"""docs/reach.md, written from the findings."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Found = dict[str, Any]
COVERED = 0.6
TITLES = {
    "clm": "Causal language models",
    "s2s": "Sequence to sequence, speech to text",
    "encoder": "Encoders",
}
HEAD = """# How far it reaches

Every class of transformers' mappings for causal language models, for sequence to sequence (speech too) and for masked
language models, and a choice of encoders of pictures and sound. Each is built small with random weights (width 64, two
to four layers that have all kinds of its blocks, in float32), and compressed on a CPU, in a process of its own.

A class **runs** when transformers builds it small and its outputs are finite. It **works** when

- at full rank, saved and loaded again, its outputs are the original's to 1e-5, of the largest where that is above
  one, or to twice what float32 loses against float64 in the original where that is more,
- its blocks, driven one at a time, put out what they do in the whole model, to 1e-4 of the largest,
- the default recipe (`reduction: 0.2`) finishes, and its checkpoint loads, has as many parameters as were planned and
  gives finite outputs.

**Covered** is which share of the numbers of all matrices inside the blocks may be factorised; **of all** is their share
of all matrices but embeddings and the head, those of another tower that is not distilled included. Small random models
say that a class is served, nothing of how well a real one keeps its quality.

Written by `python benchmarks/reach.py --out reach.jsonl --page docs/reach.md`; {versions}.

"""


def runs(found: Found) -> bool:
    """Whether transformers builds the class small, and it runs."""
    return found.get("forward") == "yes"


def works(found: Found) -> bool:
    """Whether the class is exact at full rank, its blocks are driven exactly, and the default recipe serves it."""
    return runs(found) and all(found.get(stage) == "yes" for stage in ("full", "default", "streams"))


def covers(found: Found) -> bool:
    """Whether it works and most of its blocks' weights may be factorised."""
    return works(found) and found["coverage"] >= COVERED


def write(findings: list[Found], path: Path) -> None:
    """Write the page of `findings`, one for each class."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    parts = [HEAD.format(versions=versions), summary(findings)]
    for kind, title in TITLES.items():
        if rows := sorted((one for one in findings if one["kind"] == kind), key=lambda one: one["class"].lower()):
            parts.append(f"\n## {title}\n\n{table(rows)}")
    path.write_text("".join(parts))


def summary(findings: list[Found]) -> str:
    """How many of each kind run, work, and are covered."""
    lines = [["", "classes", "run", "work", f"work, with {COVERED:.0%} covered or more"]]
    for kind, title in TITLES.items():
        of_kind = [one for one in findings if one["kind"] == kind]
        count = sum(map(runs, of_kind))
        if of_kind:
            shares = [_share(of_kind, chosen, count) for chosen in (works, covers)]
            lines.append([title, str(len(of_kind)), str(count), *shares])
    return _lines(lines)


def _share(findings: Iterable[Found], chosen: Callable[[Found], bool], of: int) -> str:
    count = sum(map(chosen, findings))
    return f"{count} ({count / of:.0%})" if of else str(count)


def table(findings: list[Found]) -> str:
    """A row for every class: what came of it, or why nothing did."""
    lines = [["class", "plugin", "works", "covered", "of all", "why not, or what is left out"]]
    for found in findings:
        share = ["", ""]
        if "coverage" in found:
            share = [f"{found['coverage']:.0%}", f"{found['of_model']:.0%}"]
        verdict = "yes" if works(found) else "no" if runs(found) else "does not run"
        lines.append([found["class"], found.get("plugin", ""), verdict, *share, _why(found)])
    return _lines(lines)


def _why(found: Found) -> str:
    """The first thing that went wrong; where all is well, the largest weights that stay dense."""
    if not works(found):
        for stage in ("builds", "forward", "plan", "full", "default", "streams", "reloads"):
            if (said := found.get(stage, "yes")) != "yes":
                label = {"full": "full rank: ", "default": "", "streams": "stream: "}.get(stage, "")
                return _clean(label + said)
        return "not tried"
    left = found.get("left", {}) if found["coverage"] < 0.995 else {}
    notes = ["a fifth of the blocks" if found.get("of") == "weights" else "", ", ".join(left)]
    return "; ".join(note for note in notes if note)


def _clean(text: str) -> str:
    """Text fit for a cell, without folders of the machine at hand."""
    import re

    text = re.sub(r"/\S*/(reach-\w+|[a-z0-9]+-[A-Z]\w+)(/\S*)?:? ?", "", text)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else f"{text[:157]}..."


def _lines(rows: list[list[str]]) -> str:
    rule = ["---"] * len(rows[0])
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
