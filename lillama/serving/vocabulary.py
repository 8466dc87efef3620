"""Token embeddings and output heads of low rank in vLLM: a table to look up, a matrix that multiplies, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from lillama.serving.loaded import Loaded
from lillama.serving.parts import Part
from lillama.serving.receiver import Receiver


class Table(nn.Module):
    """The vectors of a process's tokens, and the product with all of them where the head is the same."""

    place: Tensor | None

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.rank = len(part.first)
        self.first = nn.Parameter(part.first, requires_grad=False)
        self.second = None if part.second is None else nn.Parameter(part.second, requires_grad=False)
        place = part.source - 1
        # Two factors and dense tables have their rows in order; of a pivoted one some are in either tensor.
        behind = 0 if part.second is None else self.rank
        in_order = bool((place == torch.arange(len(place)) + behind).all())
        self.register_buffer("place", None if in_order else place.to(part.first.device), persistent=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors of tokens, by their numbers in this process."""
        if self.second is None:
            return F.embedding(ids, self.first)
        if self.place is None:
            return F.linear(F.embedding(ids, self.second), self.first.T)
        place = self.place[ids]
        rows = F.embedding(place.clamp(max=self.rank - 1), self.first)
        if not len(self.second):
            return rows
        others = F.linear(F.embedding((place - self.rank).clamp(min=0), self.second), self.first.T)
        return torch.where((place < self.rank)[..., None], rows, others)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of all tokens of this process."""
        y = F.linear(x, self.first)
        if self.second is not None:
            others = F.linear(y, self.second)
            y = others if self.place is None else torch.cat([y, others], -1)[..., self.place]
        return y if bias is None else y + bias


class LowRankVocabularyMethod(QuantizeMethodBase):
    """The rows of a process are those of its part of the vocabulary; the first factor is whole in each."""

    def __init__(self, loaded: Loaded, name: str) -> None:
        self.loaded, self.name = loaded, name

    def create_weights(self, layer: Any, inputs: int, outputs: list[int], *sizes: int, **more: Any) -> None:
        needed = layer.shard_indices.num_org_elements
        layer.received = Receiver(layer, self.name, sum(outputs), more["params_dtype"], needed)
        if not isinstance(layer, ParallelLMHead):
            layer.received.make = _table
        self.loaded.receivers[self.name] = layer.received

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


def _table(parts: list[Part], dtype: torch.dtype, device: torch.device) -> Table:
    (part,) = parts
    return Table(part)
