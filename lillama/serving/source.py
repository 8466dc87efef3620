"""The files of a checkpoint, compared with its configuration before an engine reads them."""

from __future__ import annotations

import logging
from pathlib import Path

from lillama.checkpoint import fits, seal
from lillama.errors import LillamaError

log = logging.getLogger(__name__)


class Source:
    """A directory, or an id on the hub, whose files are checked once, by names and shapes."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
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
