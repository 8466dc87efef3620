"""The text that a recipe's model writes itself, kept in the run directory: `calibration/own.jsonl`.

What it writes for training alone (`finetune.generate`) is beside it: `calibration/learned.jsonl`.

A round is a file of its own until all are there, drawn with a seed of its own: a run that is stopped goes on with the
round it was in, and ends with the text of one that was not. The text is kept with what it was made of, and is used
again as long as that is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from lillama.base import disk, memory
from lillama.base.files import atomic_file, checksum, read_checked, sha256, write_checked, write_text
from lillama.base.progress import Bar, Progress
from lillama.base.rundir import LEARNED_TEXT, ORIGINAL, OWN_TEXT, RunDirectory
from lillama.checkpoint.open import open_model
from lillama.data.render import render_rows
from lillama.data.rows import load_rows
from lillama.data.special import text_tokenizer
from lillama.errors import LillamaError
from lillama.pretrained.locate import read_tokenizer
from lillama.recipe.schema import Generate
from lillama.run import fingerprint
from lillama.run.check import positions
from lillama.run.prepare import Prepared, open_source
from lillama.run.writing import Beginnings, Round, Writing, beginnings, interleave, rounds, write_round

# Settings that say what becomes of the text, not what it is.
NOT_IN_THE_TEXT = {"split", "weight", "tokens", "prompts"}
MOST_PROMPT_CHARACTERS = 20  # for every token of a text: more of a prompt is never read


@dataclass
class OwnText:
    """The text of one run in `directory`; where `common` is given, runs share there what is the same text.

    `of` is the section of the recipe that has the model write: calibration, or finetune.
    """

    prepared: Prepared
    directory: Path
    progress: Progress
    common: Path | None = None
    of: Literal["calibration", "finetune"] = "calibration"

    def path(self) -> Path:
        """The file of the text, a .jsonl file with one `text` a line; it is written unless it is there.

        Special tokens stay in the texts, so that they are read back as they were written. Raises LillamaError for a
        model that has nothing to begin a text with.
        """
        target = self._target
        if not self.is_there(target):
            with disk.explained(self.directory):
                self._fill(target)
        return target

    def is_there(self, target: Path | None = None) -> bool:
        """Whether a file is there, unharmed, that was made of the same."""
        target = target or self._target
        about = _read(_about(target))
        return about.get("made_of") == self.made_of and target.is_file() and about.get("sha256") == sha256(target)

    @property
    def _target(self) -> Path:
        return self.directory / (OWN_TEXT if self.of == "calibration" else LEARNED_TEXT)

    @property
    def _where(self) -> str:
        return f"{self.of}.generate"

    def _fill(self, target: Path) -> None:
        if self.common is None:
            self._write(target)
            return
        shared = self.common / checksum(self.made_of)[:16] / target.name
        if not self.is_there(shared):
            self._write(shared)
        for source, copy in ((shared, target), (_about(shared), _about(target))):
            with atomic_file(copy) as temporary:
                shutil.copyfile(source, temporary)

    def _write(self, target: Path) -> None:
        """Write what is missing, and put the rounds together."""
        wanted = rounds(self.writing, list(self.begin))
        model: Any = None
        texts: dict[str, list[str]] = {kind: [] for kind in self.begin}
        with self.progress.phase("the model writes", len(wanted)) as bar:
            for this in wanted:
                file = _file_of(target, this)
                held = _read(file)
                if held.get("made_of") != self.made_of or len(held.get("texts", ())) != this.texts:
                    model = model or self._open()
                    held = self._write_round(model, file, this, bar)
                else:
                    bar.skip(1)
                texts[this.kind] += held["texts"]
        del model
        memory.give_back()
        lines = [json.dumps({"text": text, "begin": kind}, ensure_ascii=False) for kind, text in interleave(texts)]
        write_text(target, "\n".join(lines) + "\n")
        about = {"made_of": self.made_of, "sha256": sha256(target), "texts": len(lines)}
        write_checked(_about(target), about)
        for this in wanted:
            _file_of(target, this).unlink(missing_ok=True)

    def _write_round(self, model: Any, file: Path, this: Round, bar: Bar) -> dict[str, Any]:
        found = write_round(model, self.tokenizer, self.begin[this.kind], self.writing, this)
        held = {"made_of": self.made_of, "texts": found}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_checked(file, held)
        bar.advance(tokens=this.texts * self.writing.length)
        return held

    @property
    def section(self) -> Generate:
        """What the recipe says of the text."""
        recipe = self.prepared.recipe
        section = recipe.calibration.generate if self.of == "calibration" else recipe.learned_generate
        if section is None:
            raise LillamaError("the recipe does not have the model write", where=self._where)
        return section

    @cached_property
    def writing(self) -> Writing:
        """How much is written, and how."""
        recipe = self.prepared.recipe
        tokens = recipe.calibration.written if self.of == "calibration" else recipe.learned_written
        return Writing.of(self.section, tokens, positions(self.prepared.source.config), self._where)

    @cached_property
    def tokenizer(self) -> Any:
        """The original's tokenizer."""
        source = self.prepared.source
        unpacked = self.directory / ORIGINAL
        return text_tokenizer(read_tokenizer(self.prepared.recipe.model, source.where, source.gguf, unpacked))

    @cached_property
    def begin(self) -> Beginnings:
        """What the texts begin with."""
        return beginnings(self.tokenizer, self.section, self._prompts(), self.writing.length, self._where)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that decides the text."""
        return {
            "model": {key: value for key, value in self.prepared.source.identity().items() if key != "id"},
            "compute": str(self.prepared.device.compute),
            "generate": self.section.model_dump(mode="json", exclude=NOT_IN_THE_TEXT),
            "tokens": self.writing.tokens,
            "length": self.writing.length,
            "begin": hashlib.sha256(json.dumps(self.begin).encode()).hexdigest(),
        }

    def _prompts(self) -> list[str]:
        """Prompts, as many as there may be texts, in an order of the seed."""
        section = self.section
        if section.prompts is None:
            return []
        where = f"{self._where}.prompts"
        try:
            rows = load_rows(section.prompts, split="train", where=where)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(section.seed))
            given = render_rows(rows.select(order.tolist()), self.tokenizer, None, where)
        except LillamaError as error:
            error.where = where  # it has no keys below it
            raise
        most = MOST_PROMPT_CHARACTERS * self.writing.length
        found = list(itertools.islice((text[:most] for text in given if text.strip()), self.writing.texts))
        if not found:
            raise LillamaError(f"'{section.prompts}' has no text to begin with", where=where)
        return found

    def _open(self) -> Any:
        """The original, whole, on the device."""
        recipe, chosen = self.prepared.recipe, self.prepared.device
        source = open_source(recipe, chosen)
        with tempfile.TemporaryDirectory() as spare:
            place = source.fetch(Path(spare))
            model = open_model(place, chosen.compute, source.auto_class, recipe.model.trust_remote_code)
        return model.to(chosen.device)


def _file_of(target: Path, this: Round) -> Path:
    return target.with_suffix(f".{this.number:04}.json")


def _about(target: Path) -> Path:
    """What it was made of, beside a text."""
    return target.with_suffix(".json")


def written_first(own: OwnText, directory: RunDirectory, restart: bool) -> Path:
    """The file of the text of a run whose directory is not open yet; it is written now unless it is there.

    Meanwhile the directory is this process' own: what is written decides the data, and with it what run this is.
    """
    if own.is_there():
        return own.path()
    held = directory.held()
    new = fingerprint.of(own.prepared, held.get("data", "") if held else "")  # of which the text decides the data
    new = new if held is None else fingerprint.like(new, held, Path(own.prepared.source.where))
    with directory.claimed(new, restart):
        return own.path()


def _read(path: Path) -> dict[str, Any]:
    """What a file says; nothing where it is not there, or damaged."""
    try:
        return read_checked(path)
    except (OSError, ValueError):
        return {}
