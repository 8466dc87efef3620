"""The last step of a run: its result in few bits, written as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lillama.base.device import Device
from lillama.base.files import write_json
from lillama.base.progress import Progress
from lillama.base.rundir import FINETUNED, MODEL, QUANTIZED, RunDirectory
from lillama.bits.apply import Choice, Planned, quantise_, quantise_ends_
from lillama.bits.moments import Reading
from lillama.bits.targets import find_targets
from lillama.checkpoint import write as checkpoint
from lillama.checkpoint.quantizer import describe_
from lillama.checkpoint.seal import seal
from lillama.contract import WeightKind
from lillama.errors import DistillationError, LillamaError
from lillama.finetune.settings import refuse_other
from lillama.lowrank import swap
from lillama.recipe.schema import Quantize

SETTINGS = "quantize.json"  # in the checkpoint: the section of the recipe that made it, and of which weights


def source_of(directory: RunDirectory, tuned: bool) -> dict[str, str]:
    """sha256 of the weights that are put into few bits, by the names of their files: `model/`, or where `tuned` the
    fine-tuned ones.
    """
    held = directory.digests(FINETUNED if tuned else MODEL)
    return {name: digest for name, digest in held.items() if name.endswith(".safetensors")}


def finished(directory: RunDirectory, section: Quantize, source: Mapping[str, str]) -> bool:
    """Whether this was done of the weights `source`; a result of theirs by other settings is an error that says so.

    One of other weights, which were trained or made anew since, is none.
    """
    if not (directory.has(f"{QUANTIZED}/config.json") and directory.has(f"{QUANTIZED}/{SETTINGS}")):
        return False
    settings = directory.json(f"{QUANTIZED}/{SETTINGS}")
    if settings["source"] != source:
        return False
    held, wanted, place = settings["quantize"], section.model_dump(mode="json"), directory.path / QUANTIZED
    refuse_other(held, wanted, section="quantize", what="a result in few bits", place=place)
    return True


def quantise_model(
    model: Any,
    section: Quantize,
    *,
    offered: Sequence[tuple[str, WeightKind]] = (),
    batches: Sequence[Mapping[str, Tensor]] = (),
    device: Device,
    progress: Progress,
    plan: Planned | None = None,
) -> list[Choice]:
    """Put a compressed model in memory into few bits, in place, so that it saves itself as a checkpoint.

    `offered` are the weights (name, kind) that may be dense; `batches`, arguments of the model's forward pass, are what
    rounding is fitted on; `plan` says what was planned in bytes. What became of each weight. Raises LillamaError where
    nothing is left to do.
    """
    targets = find_targets(model, offered, section.what)
    if not targets and section.what != "all":
        raise _nothing_left()
    reading = None
    if section.fitted:
        reading = Reading(batches, section.tokens, device, progress)
        model.to(device.device)
    done = quantise_(model, targets, section, reading, plan)
    model.to("cpu")
    if section.what == "all":
        done += quantise_ends_(model, section.embedding, section.group_size)
    swap.close_experts(model)
    if not any(choice.storage for choice in done):
        raise _nothing_left()
    check_finite(model)
    known = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    modules = dict(getattr(known, "modules", {})) | described(done)
    describe_(model, modules, getattr(known, "shared", []), getattr(known, "shapes", {}))
    return done


def check_finite(model: Any) -> None:
    """DistillationError where rounding came to what is no number: nothing of the kind is stored."""
    for name, module in swap.factor_modules(model):
        for leaf in module.narrow():
            if not bool(module.get_parameter(leaf).isfinite().all()):
                raise DistillationError(
                    "scales of its numbers in few bits are not finite",
                    where=f"{name}.{leaf}",
                    hint="Use quantize.method: nearest; of quantize.steps, lower the learning_rate.",
                )


def _nothing_left() -> LillamaError:
    return LillamaError(
        "no weight is left that few bits could hold",
        where="quantize.what",
        hint="quantize: null leaves the step out; what: linears and what: all take weights that stayed dense.",
    )


def described(done: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """What config.json says of the weights that few bits hold now."""
    return {
        c.target.name: {"kind": c.target.kind, "storage": c.storage, "rank": c.target.rank}
        | ({"tied": c.target.tied} if c.target.tied else {})
        for c in done
        if c.storage is not None
    }


def save(
    model: Any,
    dtype: torch.dtype,
    section: Quantize,
    *,
    source: Mapping[str, str],
    directory: RunDirectory,
    card: str,
) -> None:
    """Write the checkpoint, with what stands beside the weights of the compressed one."""
    with directory.put_directory(QUANTIZED, seal) as target:
        model.to(device="cpu", dtype=dtype).save_pretrained(target)
        checkpoint.copy_beside(directory.path / MODEL, target)
        (target / "README.md").write_text(card, encoding="utf-8")
        write_json(target / SETTINGS, {"quantize": section.model_dump(mode="json"), "source": dict(source)})
