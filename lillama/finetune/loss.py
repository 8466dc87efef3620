"""The loss of fine-tuning: cross entropy of the labels, and the distance to the original's predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lillama.finetune.data import IGNORED, SHARE, of_model
from lillama.finetune.elsewhere import Elsewhere
from lillama.pretrained.predictions import Body, divergence, parts_of, positions_at_once, summed


def loss_of(
    model: Any, teacher: Any, inputs: dict[str, Any], share: float, shifted: bool, items: Any = None
) -> tuple[Tensor, Any]:
    """(loss, outputs): (1 - share) cross entropy of the labels + share KL(teacher || student), per label.

    Where `inputs` have a SHARE for every example [B], that is meant.
    `teacher` is the original, one whose body another process runs (elsewhere.py), or None. `shifted`: a causal model,
    whose position t predicts label t + 1. `items` is the number of labels to divide by
    (None: those of these inputs). Where the logits are too many to be made at once, `outputs` has none.
    """
    given = of_model(inputs)
    labels = inputs["labels"][:, 1:] if shifted else inputs["labels"]
    counts = labels != IGNORED
    items = counts.sum().clamp_min(1) if items is None else items
    shares: Tensor | float = inputs[SHARE].view(-1, 1).expand(labels.shape) if SHARE in inputs else share
    teacher = teacher if share > 0 or SHARE in inputs else None
    # The adapters of peft's model are in the modules of the one below it.
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = parts_of(range(labels.shape[1]), positions_at_once(own, len(labels)) if shifted else None)
    if len(parts) > 1:
        return _in_parts(own, teacher, given, (labels, counts, parts), shares) / items, {}
    outputs = model(**given, use_cache=False)
    logits = outputs.logits[:, :-1] if shifted else outputs.logits
    wanted = None
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(**given, use_cache=False).logits
        wanted = _chosen(wanted[:, :-1] if shifted else wanted, counts)
    return divergence(_chosen(logits, counts), labels[counts], wanted, _of(shares, counts)) / items, outputs


def _chosen(logits: Tensor, counts: Tensor) -> Tensor:
    """The rows that count; not a copy where all do."""
    return logits.flatten(0, -2) if bool(counts.all()) else logits[counts]


def _of(shares: Tensor | float, counts: Tensor) -> Tensor | float:
    return shares[counts] if isinstance(shares, Tensor) else shares


def _in_parts(
    model: Any, teacher: Any, given: dict[str, Any], at: tuple[Tensor, Tensor, list[range]], shares: Tensor | float
) -> Tensor:
    """The sum of the loss, a few positions' logits at a time; `at`: labels, which of them count, the positions."""
    labels, counts, parts = at
    body, taught = Body(model, given), None
    if teacher is not None:
        with torch.no_grad():
            taught = teacher.body(given) if isinstance(teacher, Elsewhere) else Body(teacher, given)

    def losses(hidden: Tensor) -> Iterator[Tensor]:
        for part in parts:
            here, keep = slice(part.start, part.stop), torch.tensor(part)
            some = counts[:, here]
            if not some.any():
                continue
            wanted = None
            if taught is not None:
                with torch.no_grad():
                    wanted = _chosen(taught.logits(keep), some)
            share = _of(shares[:, here] if isinstance(shares, Tensor) else shares, some)
            yield divergence(_chosen(body.logits(keep, hidden), some), labels[:, here][some], wanted, share)

    return summed(losses, body.hidden, [parameter for parameter in model.parameters() if parameter.requires_grad])
