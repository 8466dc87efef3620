"""Linear layers of vLLM whose matrices are of low rank, some or all of them, merged or not, split or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from lillama.serving.loaded import Loaded
from lillama.serving.receiver import Receiver


class LowRankLinearMethod(LinearMethodBase):
    """Matrices in any mixture of storages, ranks and dense ones: whatever the file has for the layer."""

    def __init__(self, loaded: Loaded, name: str, narrows: bool = False) -> None:
        """`narrows`: the layer may be of an MLP that lost neurons."""
        self.loaded, self.name, self.narrows = loaded, name, narrows

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        layer.received = Receiver(layer, self.name, sum(output_partition_sizes), params_dtype)
        layer.received.narrows = self.narrows
        self.loaded.add(layer.received)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.loaded.finish(layer.received)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.products(x, bias)
        return y
