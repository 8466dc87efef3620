"""`lillama plugins check`: the plugin contract on one model, a line for every check."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lillama import host, registry
from lillama.base.progress import Progress
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from lillama.run.prepare import Prepared
    from lillama.testing.contract import Check, Subject

LARGE = 50_000_000  # parameters
TINY = (
    "Build a tiny one of the same class with random weights, and check that:\n"
    "    config = AutoConfig.from_pretrained(DIR, num_hidden_layers=2, hidden_size=64, ...)\n"
    "    AutoModelForCausalLM.from_config(config).save_pretrained('tiny')\n"
    "  or say --large."
)
_folder: tempfile.TemporaryDirectory[str] | None = None  # of a plugin known by its file, as long as the process lives


@dataclass(frozen=True)
class Wanted:
    """What is to be checked: a plugin by its name, on the model in a directory."""

    plugin: str
    model: Path
    data: str | None = None
    large: bool = False


def make_known(name: str) -> str:
    """The name of a plugin; one that is given by its file (./mine.py) is known to this process as if installed.

    Raises LillamaError where there is no such file, or nothing by that name is installed.
    """
    if not name.endswith(".py"):
        registry.PLUGINS.check(name, "NAME")
        return name
    file = Path(name).resolve()
    if not file.is_file():
        raise LillamaError("there is no such file", where=name, hint="Give a file, or an installed plugin's name.")
    if not file.stem.isidentifier():
        raise LillamaError(
            f"'{file.stem}' cannot be imported: it is no name in Python", where=name, hint="Rename the file."
        )
    global _folder
    _folder = tempfile.TemporaryDirectory(prefix="lillama-plugin-")
    about = Path(_folder.name) / f"{file.stem}-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {file.stem}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[{host.GROUP}]\n{file.stem} = {file.stem}\n")
    places = [_folder.name, str(file.parent)]
    sys.path[:0] = places
    # The fresh process that loads a checkpoint must know its storages too.
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    host.get.cache_clear()
    registry.discover_again()
    registry.PLUGINS.check(file.stem, name)
    return file.stem


def check(wanted: Wanted, progress: Progress, debug: bool = False) -> int:
    """Run every check, say what fails and what to do about it; the exit status: 1 where one failed.

    Raises LillamaError for what is no fault of the plugin's: no model, a large one, one that is another plugin's.
    """
    from lillama.testing.batches import batches_for
    from lillama.testing.contract import CHECKS, examined

    try:
        prepared = _opened(wanted)
        batches = batches_for(prepared, wanted.data)
    except _FindingError as found:
        progress.say(_said(CHECKS[0], found.error))
        return 1
    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="lillama-check-") as folder,
        examined(wanted.model, Path(folder), batches, wanted.plugin) as subject,
    ):
        for one in CHECKS:
            failed += not _passes(one, subject, progress, debug)
    model, count = type(prepared.source.model).__name__, len(CHECKS)
    if failed:
        progress.say(f"{wanted.plugin}: {failed} of {count} checks failed on {model}")
        return 1
    progress.say(f"{wanted.plugin}: all {count} checks passed on {model}")
    return 0


class _FindingError(Exception):
    """What a plugin does wrong before anything can be checked."""

    def __init__(self, error: LillamaError) -> None:
        self.error = error
        super().__init__(str(error))


def _opened(wanted: Wanted) -> Prepared:
    """The model as its plugin knows it."""
    from lillama.run import prepare
    from lillama.testing.recipes import recipe_for

    if not (wanted.model / "config.json").is_file():
        raise LillamaError(
            "this is no directory of a model: it has no config.json",
            where=str(wanted.model),
            hint="model.save_pretrained(DIR) makes one.",
        )
    changes = {"calibration.dataset": wanted.data} if wanted.data else None
    recipe = recipe_for(wanted.model, Path("unused"), wanted.plugin, changes)
    source = prepare.open_source(recipe)
    if source.parameters > LARGE and not wanted.large:
        raise LillamaError(
            f"this model has {source.parameters:,} parameters: checks would take long, and show no more than on a "
            "tiny one",
            where=str(wanted.model),
            hint=TINY,
        )
    try:
        return prepare.prepare(recipe)
    except LillamaError as error:
        # Another plugin's model, or one too small for any rank, is the user's mistake; the rest is the plugin's.
        if error.what.startswith("no plugin knows") or str(error.where).startswith("compress."):
            raise
        raise _FindingError(error) from error


def _passes(check: Check, subject: Subject, progress: Progress, debug: bool) -> bool:
    """Whether a check passes; where not, that is said with what may be wrong."""
    try:
        with progress.phase(check.name, check.steps(subject)) as bar:
            check.run(subject, bar.advance)
    except Exception as error:  # whatever a stranger's plugin leads to is a finding
        if debug:
            raise
        progress.say(_said(check, error))
        return False
    return True


def _said(check: Check, error: Exception) -> str:
    kind = "" if isinstance(error, AssertionError | LillamaError) else f"{type(error).__name__}: "
    return f"FAILED {check.name}: {kind}{error}\n  {check.advice}"
