"""The method `lillama` of vLLM: which of an engine's layers may be of low rank or in few bits, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from lillama.checkpoint import described
from lillama.checkpoint.quantizer import METHOD, VERSION
from lillama.errors import LillamaError
from lillama.serving.experts import LowRankExpertsMethod
from lillama.serving.linear import LowRankLinearMethod
from lillama.serving.loaded import Loaded
from lillama.serving.parts import check_storage
from lillama.serving.source import Source
from lillama.serving.vocabulary import LowRankVocabularyMethod

WHERE = described.WHERE


class LowRankConfig(QuantizationConfig):
    """What config.json says of the factor modules, and which of the engine's layers take them.

    The engine merges layers and has names of its own, so layers are found by the last part of their names, and the
    tensors that come say the rest.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        shared: Sequence[Sequence[str]] = (),
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.modules, self.shared = modules, shared
        self.loaded = Loaded(modules, shared)
        self.names: dict[str, set[str]] = {}
        for name, how in modules.items():
            self.names.setdefault(how["kind"], set()).add(name.rpartition(".")[2])
        self.narrow = {name.rpartition(".")[2] for name in shapes or ()}  # of linears that lost neurons somewhere

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        """Of `quantization_config`. Raises LillamaError for one that this version cannot read, or serve."""
        version, modules, shared = config.get("version", VERSION), config.get("modules") or {}, config.get("shared")
        described.check_version(version, VERSION)
        described.check_modules(modules, shared)
        described.check_shapes(config.get("shapes") or {})
        for name, how in modules.items():
            try:
                check_storage(how["storage"])
            except LillamaError as error:
                raise LillamaError(error.what, where=f"{WHERE}: {name}", hint=error.hint) from error
        return cls(modules, shared or (), config.get("shapes") or {})

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # ordinary products alone

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says all

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """The engine says where the checkpoint is: a directory is compared with its configuration before it is read."""
        _check_kernels(getattr(hf_config, "architectures", None) or ())
        self.loaded.source = Source(model_name, revision, self.shared)
        self.loaded.source.check(downloaded=False)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer` keeps its weights; None where the engine knows better."""
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if isinstance(layer, LinearBase):
            if not self._takes(prefix):
                return UnquantizedLinearMethod()
            return LowRankLinearMethod(self.loaded, prefix, bool(self._parts(prefix) & self.narrow))
        return None

    def _experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Of low rank in the blocks of these numbers: what an engine calls the module is its own affair."""
        numbers = {_numbers(name) for name, how in self.modules.items() if how["kind"] == "experts"}
        if _numbers(prefix) not in numbers:
            return None
        self.loaded.takers.add("experts")
        return LowRankExpertsMethod(layer.moe_config, self.loaded, prefix)

    def _takes(self, prefix: str) -> bool:
        """Whether a matrix of the layer is of low rank, or may be one that other layers share."""
        taken = self._parts(prefix) & (self.names.get("linear", set()) | self.narrow)
        self.loaded.takers |= taken
        return bool(taken) or any(f"{prefix}.".startswith(f"{name}.") for group in self.shared for name in group)

    def _parts(self, prefix: str) -> set[str]:
        """The last parts of the names of the matrices that the engine has as one layer."""
        merged = [names for key, names in self.packed_modules_mapping.items() if f".{prefix}".endswith(f".{key}")]
        return {name.rpartition(".")[2] for name in (merged[0] if merged else [prefix])}

    def _vocabulary(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """That of an embedding, which some of the engine's models give no name, or of a head."""
        names, heads = self.names.get("embedding", set()), self.names.get("linear", set())
        head = isinstance(layer, ParallelLMHead)
        named = prefix if head else prefix or next(iter(names), "")
        last = named.rpartition(".")[2]
        if not (last in names | heads or (head and names)):  # a head may be tied to an embedding of low rank
            return None
        self.loaded.takers.add(last)
        return LowRankVocabularyMethod(self.loaded, named)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The engine asks when its layers are made, and before any weight is read."""
        self.loaded.check_places()
        return WeightsMapper()


def _check_kernels(architectures: Sequence[str]) -> None:
    """LillamaError for a model that keeps a state, on a CPU; what else vLLM may lack, its own models say."""
    models = [ModelRegistry.models[name] for name in architectures if name in ModelRegistry.models]
    if current_platform.is_cpu() and any(model.inspect_model_cls().has_inner_state for model in models):
        raise LillamaError(
            "vLLM has the kernels of state-space models for GPUs alone",
            hint="Use transformers: `import lillama`, and from_pretrained.",
        )


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())
