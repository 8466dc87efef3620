"""The last step of a run: its result in few bits, written as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lillama.base.device import Device
from lillama.base.files import write_json
from lillama.base.progress import Progress
from lillama.base.rundir import MODEL, QUANTIZED, RunDirectory
from lillama.bits.apply import Choice, quantise_, quantise_ends_
from lillama.bits.moments import Reading
from lillama.bits.targets import find_targets
from lillama.checkpoint import write as checkpoint
from lillama.checkpoint.quantizer import describe_
from lillama.checkpoint.seal import seal
from lillama.contract import WeightKind
from lillama.errors import LillamaError
from lillama.recipe.schema import Quantize

SETTINGS = "quantize.json"  # in the checkpoint: the section of the recipe that made it


def finished(directory: RunDirectory, section: Quantize) -> bool:
    """Whether this was done; a result of other settings is an error that says so."""
    if not directory.has(f"{QUANTIZED}/config.json"):
        return False
    held, wanted = directory.json(f"{QUANTIZED}/{SETTINGS}"), section.model_dump(mode="json")
    if held != wanted:
        keys = sorted(key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key))
        raise LillamaError(
            f"the run holds a result in few bits with another {', '.join(keys)}",
            where=f"quantize.{keys[0]}",
            hint=f"Give another run.out, or remove {directory.path / QUANTIZED} to do it again.",
        )
    return True


def quantise_model(
    model: Any,
    section: Quantize,
    *,
    offered: Sequence[tuple[str, WeightKind]] = (),
    batches: Sequence[Mapping[str, Tensor]] = (),
    device: Device,
    progress: Progress,
) -> list[Choice]:
    """Put a compressed model in memory into few bits, in place, so that it saves itself as a checkpoint.

    `offered` are the weights (name, kind) that may be dense; `batches`, arguments of the model's forward pass, are what
    rounding is fitted on. What became of each weight. Raises LillamaError where nothing is left to do.
    """
    targets = find_targets(model, offered, section.what)
    if not targets and section.what != "all":
        raise LillamaError("no weight is left that few bits could hold", where="quantize.what")
    reading = None
    if section.method == "compensated" and section.bits < 8:
        reading = Reading(batches, section.tokens, device, progress)
        model.to(device.device)
    with progress.timed("quantize"):
        done = quantise_(model, targets, section, reading)
        model.to("cpu")
        if section.what == "all":
            done += quantise_ends_(model, section.embedding, section.group_size)
    known = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    modules = dict(getattr(known, "modules", {})) | described(done)
    return_to = [list(group) for group in getattr(known, "shared", [])]
    describe_(model, modules, return_to)
    return done


def described(done: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """What config.json says of the weights that few bits hold now."""
    return {
        c.target.name: {"kind": c.target.kind, "storage": c.storage, "rank": c.target.rank}
        | ({"tied": c.target.tied} if c.target.tied else {})
        for c in done
        if c.storage is not None
    }


def save(model: Any, dtype: torch.dtype, section: Quantize, directory: RunDirectory, card: str) -> None:
    """Write the checkpoint, with what stands beside the weights of the compressed one."""
    with directory.put_directory(QUANTIZED, seal) as target:
        model.to(device="cpu", dtype=dtype).save_pretrained(target)
        checkpoint.copy_beside(directory.path / MODEL, target)
        (target / "README.md").write_text(card, encoding="utf-8")
        write_json(target / SETTINGS, section.model_dump(mode="json"))
