"""The compressed checkpoint in other forms: `lillama export`.

An export is a function (directory of the checkpoint, directory to write) -> None; EXPORTS names them. One with a
parameter `trust_remote_code` is told whether code that came with the model may run.
"""

from __future__ import annotations

from pathlib import Path

from lillama.base.files import atomic_directory
from lillama.checkpoint.load import load
from lillama.checkpoint.write import copy_beside
from lillama.errors import LillamaError
from lillama.pretrained.locate import explained


def export_dense(path: str | Path, target: str | Path, *, trust_remote_code: bool = False) -> None:
    """Multiply the factors back and save a model that plain transformers loads: it runs anywhere and saves nothing."""
    path, target = Path(path), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LillamaError("the directory exists and is not empty", where=str(target), hint="Name a new one.")
    model = load(path, trust_remote_code=trust_remote_code)
    if getattr(model, "hf_quantizer", None) is None:
        raise LillamaError("this checkpoint holds no factors", where=str(path))
    model.dequantize()
    if target.exists():
        target.rmdir()
    damaged = "The configuration, or a file beside it, is damaged."
    with explained("the checkpoint to write it dense", str(path), damaged), atomic_directory(target) as directory:
        model.save_pretrained(directory)
        copy_beside(path, directory)
