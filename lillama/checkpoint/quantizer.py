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

from lillama.errors import LillamaError
from lillama.lowrank import swap as factors
from lillama.pretrained import sharing

METHOD = "lillama"
VERSION = 1


class LillamaConfig(QuantizationConfigMixin):
    """Which modules are factorised, {name: {"kind", "storage", "rank"}}, and which are one (lists of names).

    A head whose factors are those of an embedding has the embedding's name as "tied".
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = VERSION,
        shared: list[list[str]] | None = None,
        **ignored: Any,
    ):
        self.quant_method = METHOD
        self.version = version
        self.modules = modules or {}
        if shared:
            self.shared = shared
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
        groups = local_groups(model, self.quantization_config)
        sharing.share(model, groups)
        sharing.tell(model, sharing.aliases(model, groups))
        for name, how in self.quantization_config.modules.items():
            module = factors.module_of(name, how["kind"])
            here = local_name(model, module)
            if here is not None:
                here += name.removeprefix(module)
                factors.replace(model, here, kind=how["kind"], storage=how["storage"], rank=how["rank"])
                ignored |= {rf"(^|\.){re.escape(dense)}$" for dense in factors.dense_names(here, how["kind"])}
        model._keys_to_ignore_on_load_unexpected = ignored
        self._tie(model)
        return model

    def _tie(self, model: Any) -> None:
        """Make the factors of a head those of the embedding it is tied to."""
        for name, how in self.quantization_config.modules.items():
            here = local_name(model, name) if how.get("tied") else None
            owner = local_name(model, how["tied"]) if here else None
            if here is None or owner is None:
                continue
            head, embedding = model.get_submodule(here), model.get_submodule(owner)
            for leaf in factors.tie(head, embedding):
                sharing.tell(model, {f"{here}.{leaf}": f"{owner}.{leaf}"}, gone=[f"{here}.weight"])

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
        sharing.unshare(model, local_groups(model, self.quantization_config))
        sharing.untell(model)
        model.tie_weights()
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


def local_groups(model: Any, config: LillamaConfig) -> list[list[str]]:
    """The shared modules of a checkpoint as `model` calls them."""
    groups = [[local_name(model, name) for name in group] for group in getattr(config, "shared", [])]
    return [[name for name in group if name is not None] for group in groups if None not in group]


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # importlib.reload must not raise
    register_quantization_config(METHOD)(LillamaConfig)
    register_quantizer(METHOD)(LillamaQuantizer)
