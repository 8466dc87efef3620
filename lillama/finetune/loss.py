"""The loss of fine-tuning: cross entropy of the labels, and the distance to the original's predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lillama.finetune.data import IGNORED
from lillama.pretrained.predictions import divergence


def loss_of(
    model: Any, teacher: Any, inputs: dict[str, Any], share: float, shifted: bool, items: Any = None
) -> tuple[Tensor, Any]:
    """(loss, outputs): (1 - share) cross entropy of the labels + share KL(teacher || student), per label.

    `shifted`: a causal model, whose position t predicts label t + 1. `items` is the number of labels to divide by
    (None: those of these inputs).
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    labels = inputs["labels"]
    outputs = model(**given, use_cache=False)
    logits = outputs.logits[:, :-1] if shifted else outputs.logits
    labels = labels[:, 1:] if shifted else labels
    counts = labels != IGNORED
    items = counts.sum().clamp_min(1) if items is None else items
    wanted = None
    if teacher is not None and share > 0:
        with torch.no_grad():
            wanted = teacher(**given, use_cache=False).logits
        wanted = _chosen(wanted[:, :-1] if shifted else wanted, counts)
    return divergence(_chosen(logits, counts), labels[counts], wanted, share) / items, outputs


def _chosen(logits: Tensor, counts: Tensor) -> Tensor:
    """The rows that count; not a copy where all do."""
    return logits.flatten(0, -2) if bool(counts.all()) else logits[counts]
