"""Token embeddings and output heads of low rank in vLLM: a table to look up, a matrix that multiplies, or both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from lillama.serving.kernels import Made, on_cpu, say_whole
from lillama.serving.loaded import Loaded
from lillama.serving.parts import Part
from lillama.serving.pieces import Matrix, Piece, whole
from lillama.serving.receiver import Receiver

Keep = Callable[[Matrix], Any]  # makes what a table looks rows up in, and multiplies by


class Table(nn.Module):
    """The vectors of a process's tokens, and the product with all of them where the head is the same."""

    place: Tensor | None

    def __init__(self, part: Part, dtype: torch.dtype, device: torch.device, keep: Keep) -> None:
        super().__init__()
        self.rank = len(part.first)
        # Of two the first is small, and multiplies from either side: no product with few bits does.
        self.first = keep(part.first) if part.second is None else Whole(whole(part.first, dtype).to(device))
        self.second = None if part.second is None else keep(part.second)
        self.others = 0 if part.second is None else len(part.second)
        place = part.source - 1
        # Two factors and dense tables have their rows in order; of a pivoted one some are in either tensor.
        behind = 0 if part.second is None else self.rank
        in_order = bool((place == torch.arange(len(place)) + behind).all())
        self.register_buffer("place", None if in_order else place.to(device), persistent=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors of tokens, by their numbers in this process."""
        if self.second is None:
            return self.first.rows(ids)
        if self.place is None:
            return F.linear(self.second.rows(ids), self.first.weight.T)
        place = self.place[ids]
        rows = self.first.rows(place.clamp(max=self.rank - 1))
        if not self.others:
            return rows
        others = F.linear(self.second.rows((place - self.rank).clamp(min=0)), self.first.weight.T)
        return torch.where((place < self.rank)[..., None], rows, others)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of all tokens of this process."""
        y: Tensor = self.first(x)
        if self.second is not None:
            others = self.second(y)
            y = others if self.place is None else torch.cat([y, others], -1)[..., self.place]
        return y if bias is None else y + bias


class Whole(nn.Module):
    """A matrix in full whose rows are looked up and that multiplies."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [...]."""
        return F.embedding(ids, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LowRankVocabularyMethod(QuantizeMethodBase):
    """The rows of a process are those of its part of the vocabulary; the first factor is whole in each."""

    def __init__(self, loaded: Loaded, name: str) -> None:
        self.loaded, self.name = loaded, name

    def create_weights(self, layer: Any, inputs: int, outputs: list[int], *sizes: int, **more: Any) -> None:
        needed = layer.shard_indices.num_org_elements
        layer.received = Receiver(layer, self.name, sum(outputs), more["params_dtype"], needed)
        if not isinstance(layer, ParallelLMHead):
            layer.received.make = functools.partial(_table, self.loaded)
        self.loaded.add(layer.received)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.received.tied_to = embed_tokens.received
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        self.loaded.finish(layer.received)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        vectors: Tensor = layer.products.look_up(ids)
        return vectors

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.products(x, bias)
        return y


def _table(loaded: Loaded, parts: list[Part], dtype: torch.dtype, device: torch.device, name: str) -> Table:
    (part,) = parts
    if isinstance(part.first, Piece) and part.second is not None:
        say_whole(name, part.first, "the first of two factors multiplies from either side, no kernel for few bits does")

    def keep(matrix: Matrix) -> Any:
        if isinstance(matrix, Tensor):
            return Whole(matrix.to(device, dtype))
        if current_platform.is_cpu():
            return on_cpu(matrix, dtype)
        if not loaded.has_tied_head():
            return Made(matrix, dtype, device)
        say_whole(name, matrix, "no kernel of vLLM's both multiplies and looks rows up")
        return Whole(matrix.whole(dtype).to(device))

    return Table(part, dtype, device, keep)
