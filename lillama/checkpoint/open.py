"""Any model in a directory or on the hub, opened: a compressed one strictly, others as transformers does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama import host
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from lillama.base.tensorfile import TensorFile
    from lillama.recipe.schema import Recipe


def open_model(place: str | Path, dtype: Any = "auto", auto_class: Any = None, trust: bool = False) -> Any:
    """The model in a directory (or on the hub), a compressed one loaded strictly, on the CPU in eval mode.

    `trust` allows modelling code that comes with it to run; nothing in the directory itself can. Pickled weights, which
    can run code as well, are never read.
    """
    from transformers import AutoModelForCausalLM

    from lillama.checkpoint.load import load
    from lillama.pretrained.locate import explained, read_configuration

    _check_place(place)
    with explained(f"the model '{place}'", "directory", _hint(place)):
        config = read_configuration(place, trust=trust)
        if is_compressed(config):
            model = load(place, trust_remote_code=trust, dtype=dtype).eval()
            _derive(model)
            return model
        auto = auto_class or AutoModelForCausalLM
        options = {"config": config, "dtype": dtype, "trust_remote_code": trust, "use_safetensors": True}
        return auto.from_pretrained(place, **options).eval()


def _derive(model: Any) -> None:
    """Have factor modules derive what they want of their indices before anything runs.

    Small tensors that stay, made between the large ones of a first forward pass, leave holes in memory: of a model of
    135 M parameters that read four windows of 512 tokens 750 MB.
    """
    from lillama.lowrank.module import FactorModule

    for module in model.modules():
        if isinstance(module, FactorModule):
            for matrix in module.matrices().values():
                matrix.derived(module)


def is_compressed(config: Any) -> bool:
    """Whether a configuration is that of a checkpoint written by a run."""
    given = getattr(config, "quantization_config", None) or {}
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return bool(method == "lillama")


def _check_place(place: str | Path) -> dict[Path, TensorFile]:
    """The weights of a directory, whatever is wrong with them said; nothing of a model on the hub."""
    if not Path(place).is_dir():
        return {}
    from lillama.pretrained.headers import open_files
    from lillama.pretrained.vetted import check_directory

    check_directory(Path(place))
    return open_files(Path(place))


def _hint(place: str | Path) -> str | None:
    return "It is damaged, or of a kind that transformers does not know." if Path(place).is_dir() else None


def find_plugin(
    place: str | Path, recipe: Recipe | None, name: str = "auto", trust: bool = False
) -> tuple[host.Plugin | None, Any]:
    """(the plugin that knows the model in a directory, its auto class); None where none does: evaluation needs none.

    Where there is no recipe, `name` may choose the plugin; `trust` is as for `open_model`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from lillama.pretrained.headers import check_size
    from lillama.pretrained.locate import explained, read_configuration

    hosts, name = host.get(), recipe.plugin if recipe else name
    with explained(f"the model '{place}'", "directory", _hint(place)):
        config = copy.deepcopy(read_configuration(place, trust=trust))
    files = _check_place(place)
    if is_compressed(config):  # plugins list the layers of the original
        del config.quantization_config
        files = {}
    auto = hosts.auto_class(config, recipe, name) or AutoModelForCausalLM
    with explained(f"the model '{place}'", "directory", _hint(place)), init_empty_weights(include_buffers=False):
        skeleton = auto.from_config(config, trust_remote_code=trust)
    if files and getattr(config, "quantization_config", None) is None:
        check_size(skeleton, files.values(), str(place))
    try:
        return hosts.layers(skeleton, recipe, name)[0], auto
    except LillamaError:
        if name != "auto":
            raise
        return None, auto
