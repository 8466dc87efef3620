"""The files of a checkpoint, compared with its configuration before an engine reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from lillama.base.tensorfile import TensorFile
from lillama.checkpoint import fits, seal
from lillama.errors import LillamaError
from lillama.pretrained.headers import open_files

log = logging.getLogger(__name__)


class Source:
    """A directory, or an id on the hub, whose files are checked once, by names and shapes."""

    def __init__(self, name: str, revision: str | None, shared: Sequence[Sequence[str]]) -> None:
        """`shared`: the names of modules that are one and the same, by groups."""
        self.name, self.revision, self.shared = name, revision, shared
        self._checked = False

    def check(self, downloaded: bool) -> None:
        """LillamaError that names a tensor which is missing, or of another shape than config.json makes it.

        Of an id on the hub the files are there only after the engine has read them (`downloaded`).
        """
        directory = Path(self.name) if Path(self.name).is_dir() else self._on_disk() if downloaded else None
        if directory is None or self._checked:
            return
        self._checked = True
        if found := seal.cut_short(directory):
            raise LillamaError(f"this is not as it was written: {'; '.join(found[:5])}", where=str(directory))
        _check_shared(open_files(directory).values(), [group[0] for group in self.shared])
        try:
            unchecked = fits.check(directory)
        except LillamaError as error:
            if not isinstance(error.__cause__, AssertionError):
                raise
            unchecked = "shapes, since vLLM changed the model's class in this process"
        if unchecked:
            log.warning("%s: not compared with its configuration: %s", directory, unchecked)

    def _on_disk(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            log.warning("%s: not compared with its configuration: its files are in no cache", self.name)
            return None


def _check_shared(files: Iterable[TensorFile], names: Sequence[str]) -> None:
    """LillamaError unless shared modules are made of linears: an engine has several layers, which then share these."""
    for file in files:
        for key in file:
            linear = key.endswith(".bias") or (key.endswith(".weight") and len(file.shape(key)) == 2)
            if not linear and key.startswith(tuple(f"{name}." for name in names)):
                raise LillamaError(
                    "it is in a module that several blocks share, and no linear: that cannot be served",
                    where=key,
                    hint="`lillama export DIR OUT --dense` writes a model that any engine serves.",
                )
