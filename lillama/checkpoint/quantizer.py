"""The checkpoint format, as a transformers quantizer: `import lillama`, then load and save as always.

config.json carries `quantization_config: {"quant_method": "lillama", "version": ..., "modules": {...}}`. While the
model is a skeleton on the meta device the named modules are replaced by factor modules, so that
sharding, device_map, dtypes, generate, Trainer and pipeline see an ordinary model. See docs/checkpoint.md.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama.base.tensorfile import TensorFile
from lillama.checkpoint import described
from lillama.errors import LillamaError
from lillama.factorise.initialisers import svd
from lillama.lowrank import swap as factors
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.narrow import Shapes, narrow, widened
from lillama.lowrank.storage import Factors
from lillama.plan.plan import Plan
from lillama.pretrained import sharing
from lillama.pretrained.headers import check_size

Modules = Mapping[str, Mapping[str, Any]]  # name -> kind, storage, rank, and tied where it is
METHOD = "lillama"
VERSION = 3
FIRST_WITH = {":": 2}  # what the names of storages have that earlier versions cannot read, and since when
FIRST_WITH_SHAPES = 3


class LillamaConfig(QuantizationConfigMixin):
    """Which modules are factorised, {name: {"kind", "storage", "rank"}}, and which are one (lists of names).

    A head whose factors are those of an embedding has the embedding's name as "tied". `shapes` are those of linears
    that lost neurons, factorised or not: {name: [d_out, d_in]}.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int | None = None,
        shared: list[list[str]] | None = None,
        shapes: dict[str, list[int]] | None = None,
        **ignored: Any,
    ):
        if version is not None:
            described.check_version(version, VERSION)
        described.check_modules({} if modules is None else modules, shared)
        described.check_shapes({} if shapes is None else shapes)
        self.quant_method = METHOD
        self.version = version_of(modules or {}, shapes)
        self.modules = modules or {}
        if shared:
            self.shared = shared
        if shapes:
            self.shapes = shapes


def version_of(modules: Modules, shapes: Shapes | None = None) -> int:
    """The version of the format that these modules need: earlier readers go on reading what they can."""
    if shapes:
        return FIRST_WITH_SHAPES
    names = {how["storage"] for how in modules.values()}
    return max((since for sign, since in FIRST_WITH.items() if any(sign in name for name in names)), default=1)


def renamed(model: Any, names: list[str]) -> list[str]:
    """What transformers takes `names` of a checkpoint for, where it takes them for an original's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    for renaming in get_model_conversion_mapping(model):
        if isinstance(renaming, WeightRenaming):
            names = [renaming.rename_source_key(name)[0] for name in names]
    return names


class LillamaQuantizer(HfQuantizer):
    """Swaps factor modules in before the weights are read."""

    requires_calibration = True
    quantization_config: LillamaConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if type(model).__name__ in (model.config.architectures or ()):  # a base model lacks what the whole one has
            described.check_all_there(missing_modules(model, self.quantization_config))
        groups = local_groups(model, self.quantization_config)
        sharing.share(model, groups)
        sharing.tell(model, sharing.aliases(model, groups))
        here = local_modules(model, self.quantization_config.modules)
        gone = [dense for name, how in here.items() for dense in factors.dense_names(name, how["kind"])]
        ignored = {rf"(^|\.){re.escape(dense)}$" for dense in [*gone, *renamed(model, gone)]}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        place_factors(model, here, local_shapes(model, self.quantization_config))
        files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files:
            check_size(model, map(TensorFile, files), str(files[0].parent))
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        # Not super(), and unmarked again: factors are plain floating-point parameters, while transformers lets a model
        # that `is_quantized` neither change its type (.half(), .float()) nor train.
        model.is_quantized = False
        model.config.quantization_config = self.quantization_config
        factors.lay_out(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        state = model.state_dict()
        narrow: dict[int | str, Tensor] = {}  # by address: the numbers of a tied head stay its embedding's
        for name, module in factors.factor_modules(model):
            factors.check_plain(name, module)
            state |= factors.markers(name, module.kind)
            for leaf in module.narrow():  # which are bfloat16 numbers, whatever they are computed with
                held = state[f"{name}.{leaf}"]
                state[f"{name}.{leaf}"] = narrow.setdefault(held.data_ptr() or f"{name}.{leaf}", held.bfloat16())
        return state, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, module in list(factors.factor_modules(model)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, factors.to_dense(module))
        _widen(model, local_shapes(model, self.quantization_config))
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


def place_factors(model: Any, modules: Modules, shapes: Shapes | None = None) -> Any:
    """Put empty factor modules into `model` where `modules` (names as the model has them) says; what is tied is one.

    Before that linears lose the neurons that `shapes` say.
    """
    for name, shape in (shapes or {}).items():
        narrow(model, name, shape)
    described.check_places(model, modules)
    if any(how["kind"] == "linear" for how in modules.values()):
        # It has children, and whoever spreads a model over devices would part one factor from the other.
        model._no_split_modules = {*(model._no_split_modules or ()), LowRankLinear.__name__}
    for name, how in modules.items():
        factors.replace(model, name, kind=how["kind"], storage=how["storage"], rank=how["rank"])
    for name, how in modules.items():
        if how.get("tied"):
            head, embedding = model.get_submodule(name), model.get_submodule(how["tied"])
            for leaf in factors.tie(head, embedding):
                sharing.tell(model, {f"{name}.{leaf}": f"{how['tied']}.{leaf}"}, gone=[f"{name}.weight"])
    return model


def factorise_(
    model: Any, plan: Plan | Modules, initialise: Callable[[Tensor, int], Factors] = svd, shared: sharing.Groups = ()
) -> Any:
    """Put low-rank factors in place of the planned weights of a model in memory, and return the model.

    `plan` is one of `lillama.make_plan`, or what config.json says of modules: {name: {"kind", "storage", "rank"}}, with
    "tied" for a head that has an embedding's factors. Every weight W starts at `initialise(W, rank)`, the truncated SVD
    unless told otherwise; a model on the meta device gets empty modules. Afterwards the model saves itself
    (`save_pretrained`) as a compressed checkpoint; `shared` names the groups of its modules that are one. Raises
    LillamaError where the model has no such module, or one of another kind.
    """
    modules = plan.modules() if isinstance(plan, Plan) else plan
    if isinstance(plan, Plan) and (shapes := plan.shapes()):
        hint = "Run the recipe: `lillama.compress` removes them by what was measured."
        raise LillamaError(
            "the plan removes neurons, which no initialiser chooses", where=next(iter(shapes)), hint=hint
        )
    for name, how in modules.items():
        if local_name(model, factors.module_of(name, how["kind"])) is None:
            raise LillamaError("the model has no such module", where=name, hint="The plan is of another model.")
    here = local_modules(model, modules)
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, how in here.items():
        W = factors.dense(model, name, how["kind"])
        if not W.is_meta and not how.get("tied"):
            each = [initialise(one, how["rank"]) for one in (W if how["kind"] == "experts" else W[None])]
            A, B = (torch.stack(one) for one in zip(*each))
            starts[name] = (A, B) if how["kind"] == "experts" else (A[0], B[0])
    place_factors(model, here)
    for name, (A, B) in starts.items():
        factors.set_factors(model, name, here[name]["kind"], A, B)
    for name, how in here.items():
        if how.get("tied"):  # the indices of an embedding, which are not parameters, are its head's as well
            factors.copy_indices(model.get_submodule(name), model.get_submodule(how["tied"]))
    return describe_(model, modules, shared)


def describe_(model: Any, modules: Modules, shared: sharing.Groups = (), shapes: Shapes | None = None) -> Any:
    """Let `model`, which has these factor modules, save itself as a checkpoint; returns the model."""
    model.hf_quantizer = LillamaQuantizer(
        LillamaConfig(
            {name: dict(how) for name, how in modules.items()},
            shared=[list(group) for group in shared],
            shapes={name: list(shape) for name, shape in (shapes or {}).items()},
        )
    )
    return model.hf_quantizer.postprocess_model(model)


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


def local_modules(model: Any, modules: Modules) -> dict[str, dict[str, Any]]:
    """`modules` under the names that `model` has for them, less those that it lacks."""
    found: dict[str, dict[str, Any]] = {}
    for name, how in modules.items():
        module = factors.module_of(name, how["kind"])
        here = local_name(model, module)
        tied = local_name(model, how["tied"]) if how.get("tied") else None
        if here is not None and (tied is not None or not how.get("tied")):
            found[here + name.removeprefix(module)] = {**how, "tied": tied}
    return found


def local_shapes(model: Any, config: LillamaConfig) -> dict[str, Sequence[int]]:
    """The shapes of linears that lost neurons, as `model` calls them."""
    named = ((local_name(model, name), shape) for name, shape in getattr(config, "shapes", {}).items())
    return {name: shape for name, shape in named if name is not None}


def _widen(model: Any, shapes: Shapes) -> None:
    """Let dense linears that lost neurons have the original's shape again, zeros in their place."""
    if not shapes:
        return
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(model.config))
    for name in shapes:
        parent, _, child = name.rpartition(".")
        wide = tuple(whole.get_submodule(name).weight.shape)
        setattr(model.get_submodule(parent), child, widened(model.get_submodule(name), wide))


def missing_modules(model: Any, config: LillamaConfig) -> list[str]:
    """The modules that a checkpoint speaks of and `model` lacks."""
    names = [factors.module_of(name, how["kind"]) for name, how in config.modules.items()]
    names += getattr(config, "shapes", {})
    named = [*names, *(name for group in getattr(config, "shared", []) for name in group)]
    return [name for name in named if local_name(model, name) is None]


def local_groups(model: Any, config: LillamaConfig) -> list[list[str]]:
    """The shared modules of a checkpoint as `model` calls them."""
    groups = [[local_name(model, name) for name in group] for group in getattr(config, "shared", [])]
    return [[name for name in group if name is not None] for group in groups if None not in group]


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # importlib.reload must not raise
    register_quantization_config(METHOD)(LillamaConfig)
    register_quantizer(METHOD)(LillamaQuantizer)
