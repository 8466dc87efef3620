"""Batches of model arguments: from blocks of text, and what stands for them when a run is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def text_batches(blocks: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches {"input_ids": [B, T]} of the blocks [N, T] in order, the last one as large as what is left.

    There is no attention mask because nothing is padded.
    """
    return [{"input_ids": part} for part in blocks.split(batch_size)]


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """16 hex digits of the sha256 over names, types, shapes and bytes of all tensors, for resume.

    Where a batch holds `digest`, that stands for its floating-point tensors: they were computed by a model, and another
    number of threads may change their last bits.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            if tensor.is_floating_point() and "digest" in batch:
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"batch\n")
    return digest.hexdigest()[:16]
