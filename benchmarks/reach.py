"""How far Lillama reaches: every class of transformers' mappings, built small and compressed by the default recipe.

    python benchmarks/reach.py --out reach.jsonl                     # all classes; continues where it was stopped
    python benchmarks/reach.py --out reach.jsonl --kind s2s --again failed
    python benchmarks/reach.py --out some.jsonl --only GPT2LMHeadModel T5ForConditionalGeneration
    python benchmarks/reach.py --out reach.jsonl --only --page docs/reach.md --causes    # measures nothing

A class runs in a process of its own, one at a time, with a limit of time and of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from reaching import causes, classes, page


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options that were given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each class; added to")
    parser.add_argument("--kind", nargs="+", choices=classes.KINDS, default=list(classes.KINDS))
    parser.add_argument("--only", nargs="*", metavar="NAME", help="classes or model types; none: measure nothing")
    parser.add_argument("--again", choices=["no", "failed", "all"], default="no", help="what to measure once more")
    parser.add_argument("--plugin", default="auto")
    parser.add_argument("--seconds", type=float, default=60, help="limit of processor time for a class")
    parser.add_argument("--gib", type=float, default=12, help="limit of address space for a class")
    parser.add_argument("--keep", type=Path, help="folder that keeps what the classes leave")
    parser.add_argument("--page", type=Path, help="write the page of all that --out holds")
    parser.add_argument("--causes", action="store_true", help="list what failed, grouped by cause")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    held = read(options.out)
    wanted = [one for one in classes.listed(tuple(options.kind)) if chosen(one, options, held)]
    if wanted:
        prepare_parent()
    for number, one in enumerate(wanted, 1):
        found = in_own_process(one, options)
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{number}/{len(wanted)} {line(found)}", flush=True)
    if options.page:
        page.write(list(read(options.out).values()), options.page)
    if options.causes:
        print(causes.grouped(list(read(options.out).values())))


def chosen(one: classes.Class, options: argparse.Namespace, held: dict[tuple[str, str], dict[str, Any]]) -> bool:
    """Whether the user wants this class, and it was not measured before."""
    if options.only is not None and not {one.name, one.model_type} & set(options.only):
        return False
    before = held.get((one.kind, one.name))
    return before is None or options.again == "all" or (options.again == "failed" and not page.works(before))


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last finding on every class."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(text) for text in lines]
    return {(one["kind"], one["class"]): one for one in found}


def prepare_parent() -> None:
    """Import once what every class needs; nothing is computed here, so that children start without threads.

    Reports are left out: they take as long as all the rest, and do not depend on the class.
    """
    from reaching import measure  # noqa: F401

    from lillama import host
    from lillama.report import html

    html.write = lambda path: path / "report.html"
    host.get()
    gc.freeze()  # a child's own collections pass over what is here


def in_own_process(one: classes.Class, options: argparse.Namespace) -> dict[str, Any]:
    """The findings on a class from a child that may hang, die or eat memory."""
    folder = options.keep / f"{one.kind}-{one.name}" if options.keep else Path(tempfile.mkdtemp(prefix="reach-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes = folder / "notes.json"
    start = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(one, folder, options))
    child.start()
    if late := not in_time(child, options.seconds):
        child.kill()
        child.join()
    basis = {"kind": one.kind, "model_type": one.model_type, "class": one.name}
    found: dict[str, Any] = basis | (json.loads(notes.read_text()) if notes.is_file() else {})
    if late or child.exitcode:
        stage = found.get("at") or "builds"
        found[stage] = f"longer than {options.seconds:.0f} s" if late else f"the process ended with {child.exitcode}"
        found.setdefault("defects", []).append(stage)
        found["seconds"] = round(time.monotonic() - start, 1)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def in_time(child: Any, seconds: float) -> bool:
    """Wait for a child; False where it has used `seconds` of a processor, or ten times that by the clock."""
    end = time.monotonic() + 10 * seconds
    while child.is_alive():
        with contextlib.suppress(psutil.Error):
            used = psutil.Process(child.pid).cpu_times()
            if used.user + used.system > seconds or time.monotonic() > end:
                return False
        child.join(0.2)
    return True


def _child(one: classes.Class, folder: Path, options: argparse.Namespace) -> None:
    import torch
    from reaching import measure

    size = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    measure.keep_notes(folder / "notes.json")
    found = measure.measure(one, folder, options.plugin)
    (folder / "notes.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def line(found: dict[str, Any]) -> str:
    """One line on a class for the terminal."""
    said = " ".join(f"{stage}={found[stage]}" for stage in causes.STAGES if stage in found and found[stage] != "yes")
    share = f" {found['coverage']:.0%}" if "coverage" in found else ""
    return f"{found['kind']} {found['class']}{share} {said or 'works'} ({found.get('seconds', 0)} s)"


if __name__ == "__main__":
    main()
