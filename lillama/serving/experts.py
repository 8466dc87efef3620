"""Experts of vLLM's mixtures whose projections are of low rank, each for itself and in a storage of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from lillama.dense.experts import PROJECTIONS
from lillama.errors import LillamaError
from lillama.lowrank.whole import NAME as DENSE
from lillama.serving.loaded import Loaded
from lillama.serving.parts import check_shapes, matrices_of, part_of, size_of, storage_of
from lillama.serving.pieces import Matrix
from lillama.serving.products import Products
from lillama.serving.receiver import AGAIN

ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
}
ENTRIES = ("gate", "up")


class ExpertsReceiver:
    """Takes the stacked tensors of a module of experts: `gate_A`, `down_B`, `up_W` where one is dense."""

    tied_to = None

    def __init__(self, layer: Any, name: str, dtype: torch.dtype) -> None:
        self.layer, self.name, self.dtype = layer, name, dtype
        self.device = torch.empty(0).device
        self.held: dict[str, dict[str, Tensor]] = {}
        layer.load_weights = self.load_weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """What the engine calls with the tensors below the module, by their names in it."""
        for name, tensor in weights:
            projection, _, suffix = name.partition("_")
            if tensor.numel() == 0 and name.endswith(".weight"):
                continue  # stands for the dense weights that are gone (docs/checkpoint.md)
            if projection not in PROJECTIONS:
                raise LillamaError("a dense weight came where experts are of low rank", where=f"{self.name}.{name}")
            self.held.setdefault(projection, {})["weight" if suffix == "W" else suffix] = tensor
            yield name

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What came."""
        return self.held

    @property
    def low_rank(self) -> int:
        """How many stacks of low rank or in few bits came."""
        return sum(storage_of(tensors) not in (DENSE, None) for tensors in self.held.values())

    def check(self) -> None:
        """LillamaError that names a projection of which something did not come."""
        for projection in PROJECTIONS:
            if storage_of(self.held.get(projection, {})) is None:
                came = ", ".join(self.held.get(projection, {})) or "nothing"
                raise LillamaError(
                    f"{came} came, which is no whole matrix", where=f"{self.name}.{projection}", hint=AGAIN
                )
            stacks = {len(tensor) for tensor in self.held[projection].values()}
            if stacks != {self.layer.global_num_experts}:
                raise LillamaError(
                    f"tensors of {sorted(stacks)} experts, where the model has {self.layer.global_num_experts}",
                    where=f"{self.name}.{projection}",
                    hint=AGAIN,
                )

    def build(self) -> Experts:
        """All experts, as this process computes them: each has its share of the inner width here."""
        self.check()
        config = self.layer.moe_config
        size = config.intermediate_size_per_partition
        own = torch.arange(config.tp_rank * size, (config.tp_rank + 1) * size)
        experts = []
        for expert in range(self.layer.global_num_experts):
            parts = []
            for place, projection in enumerate(ENTRIES):
                rows = torch.zeros(len(ENTRIES) * size, dtype=torch.long)
                rows[place * size : (place + 1) * size] = own + 1
                parts.append(part_of(self._of(projection, expert), rows, None))
            down = self._of("down", expert)
            last = part_of(down, torch.arange(1, size_of(down)[0] + 1), own)
            name = f"{self.name}.{expert}"
            experts.append(Expert(*(Products(some, self.dtype, self.device, name) for some in (parts, [last]))))
        self.held.clear()
        return Experts(experts, ACTIVATIONS[self.layer.activation])

    def _of(self, projection: str, expert: int) -> dict[str, Matrix]:
        tensors = {suffix: tensor[expert] for suffix, tensor in self.held[projection].items()}
        try:
            matrices = matrices_of(tensors)
            check_shapes(matrices)
        except LillamaError as error:
            raise LillamaError(error.what, where=f"{self.name}.{projection}", hint=AGAIN) from error
        return matrices

    def remove_placeholders(self) -> None:
        """There are none."""


class Expert(nn.Module):
    """One expert: gate and up have one first product."""

    def __init__(self, entries: Products, down: Products) -> None:
        super().__init__()
        self.entries, self.down = entries, down


class Experts(nn.Module):
    """Every expert by itself, with the tokens that chose it."""

    def __init__(self, experts: list[Expert], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.experts, self.activation = nn.ModuleList(experts), activation

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [T, H], the router's weights and choices [T, K] -> [T, H]."""
        out = torch.zeros_like(x)
        for number in torch.unique(index).tolist():
            choice, token = torch.where(index.T.eq(number))
            expert: Any = self.experts[number]
            gate, up = expert.entries(x[token]).chunk(2, -1)
            y = expert.down(self.activation(gate) * up)
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out


def _run(x: Tensor, weights: Tensor, index: Tensor, layer: str) -> Tensor:
    y: Tensor = get_forward_context().no_compile_layers[layer].products(x, weights, index)
    return y


def _shape(x: Tensor, weights: Tensor, index: Tensor, layer: str) -> Tensor:
    return torch.empty_like(x)


# Which experts run depends on numbers, which no compiler can look into: for it, this is one operation.
direct_register_custom_op("lillama_experts", _run, fake_impl=_shape)


class LowRankExpertsMethod(FusedMoEMethodBase):
    """A loop over the experts that were chosen; what such a loop cannot serve is refused when the layer is made."""

    def __init__(self, moe: Any, loaded: Loaded, name: str) -> None:
        super().__init__(moe)
        self.loaded, self.name = loaded, name

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        if why := self._why_not(layer):
            hint = "`lillama export DIR OUT --dense` writes a model that any engine serves."
            raise LillamaError(f"its low-rank experts cannot be served: {why}", where=self.name, hint=hint)
        layer.received = ExpertsReceiver(layer, self.name, params_dtype)
        self.loaded.receivers[self.name] = layer.received
        self.key = f"{self.name}.lillama"
        get_current_vllm_config().compilation_config.static_forward_context[self.key] = layer

    def _why_not(self, layer: Any) -> str | None:
        limits = [getattr(layer, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta")]
        if layer.activation not in ACTIVATIONS or any(limit is not None for limit in limits):
            return f"their activation is {layer.activation.value}, with {limits}"
        if self.moe.has_bias:
            return "they have biases"
        if layer.use_ep:
            return "they are split between processes by expert"
        if layer.apply_router_weight_on_input:
            return "the router's weights go to their inputs"
        if not (current_platform.is_cpu() or get_current_vllm_config().model_config.enforce_eager):
            return "a loop over them cannot be captured as a graph: --enforce-eager"
        return None

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # nothing is scaled

    def process_weights_after_loading(self, layer: Any) -> None:
        self.loaded.finish(layer.received)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        # Experts that all tokens share, if there are any, are run by the caller.
        y: Tensor = torch.ops.vllm.lillama_experts(x, topk_weights, topk_ids, self.key)
        return y
