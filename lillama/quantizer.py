"""The checkpoint format, as a transformers quantizer: `import lillama`, then load and save as always.

config.json carries `quantization_config: {"quant_method": "lillama", "version": 1, "modules": {...}}`. While the
model is a skeleton on the meta device the named modules are replaced by factor modules, so that
sharding, device_map, dtypes, generate, Trainer and pipeline see an ordinary model. See docs/checkpoint.md.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama import factors
from lillama.errors import LillamaError

METHOD = "lillama"
VERSION = 1


class LillamaConfig(QuantizationConfigMixin):
    """Which modules are factorised: {name: {"kind", "storage", "rank"}}."""

    def __init__(self, modules: dict[str, dict[str, Any]] | None = None, version: int = VERSION, **ignored: Any):
        self.quant_method = METHOD
        self.version = version
        self.modules = modules or {}
        if version > VERSION:
            raise LillamaError(
                f"the checkpoint is of format version {version}, this lillama reads up to {VERSION}",
                hint="Upgrade lillama.",
            )


class LillamaQuantizer(HfQuantizer):
    """Swaps factor modules in before the weights are read."""

    requires_calibration = True
    quantization_config: LillamaConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        for name, how in self.quantization_config.modules.items():
            module = factors.module_of(name, how["kind"])
            here = local_name(model, module)
            if here is not None:
                here += name.removeprefix(module)
                factors.replace(model, here, kind=how["kind"], storage=how["storage"], rank=how["rank"])
                ignored |= {rf"(^|\.){re.escape(dense)}$" for dense in factors.dense_names(here, how["kind"])}
        model._keys_to_ignore_on_load_unexpected = ignored
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        # Not super(), and unmarked again: factors are plain floating-point parameters, while transformers lets a model
        # that `is_quantized` neither change its type (.half(), .float()) nor train.
        model.is_quantized = False
        model.config.quantization_config = self.quantization_config
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        state = model.state_dict()
        for name, module in model.named_modules():
            if kind := factors.kind_of(module):
                state |= factors.markers(name, kind)
        return state, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name in [n for n, m in model.named_modules() if factors.is_factorised(m)]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, factors.to_dense(model.get_submodule(name)))
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def local_name(model: Any, name: str) -> str | None:
    """`name` as `model` calls it: a base model (AutoModel) lacks the prefix of the whole one.

    None when this model has no such module at all (a head, in a base model).
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # importlib.reload must not raise
    register_quantization_config(METHOD)(LillamaConfig)
    register_quantizer(METHOD)(LillamaQuantizer)
