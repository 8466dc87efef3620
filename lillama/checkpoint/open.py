"""Any model in a directory or on the hub, opened: a compressed one strictly, others as transformers does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama import host
from lillama.errors import LillamaError

if TYPE_CHECKING:
    from lillama.recipe.schema import Recipe


def open_model(place: str | Path, dtype: Any = "auto", auto_class: Any = None, trust: bool = False) -> Any:
    """The model in a directory (or on the hub), a compressed one loaded strictly, on the CPU in eval mode.

    `trust` allows modelling code that comes with it to run; nothing in the directory itself can.
    """
    from transformers import AutoModelForCausalLM

    from lillama.checkpoint.load import load
    from lillama.pretrained.locate import explained, read_configuration

    with explained(f"the model '{place}'", "directory"):
        config = read_configuration(place, trust=trust)
        if is_compressed(config):
            return load(place, trust_remote_code=trust, dtype=dtype).eval()
        auto = auto_class or AutoModelForCausalLM
        return auto.from_pretrained(place, config=config, dtype=dtype, trust_remote_code=trust).eval()


def is_compressed(config: Any) -> bool:
    """Whether a configuration is that of a checkpoint written by a run."""
    given = getattr(config, "quantization_config", None) or {}
    return (given.get("quant_method") if isinstance(given, dict) else given.quant_method) == "lillama"


def find_plugin(
    place: str | Path, recipe: Recipe | None, name: str = "auto", trust: bool = False
) -> tuple[host.Plugin | None, Any]:
    """(the plugin that knows the model in a directory, its auto class); None where none does: evaluation needs none.

    Where there is no recipe, `name` may choose the plugin; `trust` is as for `open_model`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from lillama.pretrained.locate import explained, read_configuration

    hosts, name = host.get(), recipe.plugin if recipe else name
    with explained(f"the model '{place}'", "directory"):
        config = copy.deepcopy(read_configuration(place, trust=trust))
    if is_compressed(config):  # plugins list the layers of the original
        del config.quantization_config
    auto = hosts.auto_class(config, recipe, name) or AutoModelForCausalLM
    with explained(f"the model '{place}'", "directory"), init_empty_weights(include_buffers=False):
        skeleton = auto.from_config(config, trust_remote_code=trust)
    try:
        return hosts.layers(skeleton, recipe, name)[0], auto
    except LillamaError:
        if name != "auto":
            raise
        return None, auto
