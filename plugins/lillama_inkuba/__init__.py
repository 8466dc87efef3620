"""InkubaLM: the token embedding and the output head, 60 % of its parameters; decoder blocks are passed through.

Serves any model of the same shape (Llama and kin) by `plugin: inkuba`, with tied embeddings too: one pair of factors
is then both. Of InkubaLM itself it knows that all blocks use one MLP, of which the files hold a copy per block, and
that transformers has the architecture, so that the code in its repository, written for an older version, is not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lillama import Layer, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Its configuration names classes of its own ("Vulavula" is the maker's name for its models).
NAMES = ("inkuba", "vulavula")
# Where the names are gone (a configuration written by transformers' own class), no other model has this shape.
SHAPE = {"vocab_size": 61788, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
# What would make transformers run the repository's code, or look for it.
FOREIGN = ("auto_map", "model_type", "architectures", "transformers_version")


def is_inkuba(config: dict[str, Any]) -> bool:
    """Whether a configuration is InkubaLM's."""
    said = [config.get("model_type"), config.get("architectures"), config.get("auto_map"), config.get("_name_or_path")]
    return any(name in str(said).lower() for name in NAMES) or SHAPE.items() <= config.items()


@hookimpl
def configuration(config: dict[str, Any]) -> PreTrainedConfig | None:
    if not is_inkuba(config):
        return None
    from transformers import LlamaConfig

    native = LlamaConfig(**{key: value for key, value in config.items() if key not in FOREIGN})
    native.architectures = ["InkubaLM"]  # by which it is known below; the model's class in what is saved
    return native


@hookimpl
def shared_modules(model: PreTrainedModel) -> list[list[str]] | None:
    if not is_inkuba(model.config.to_dict()):
        return None
    return [[f"model.layers.{i}.mlp" for i in range(model.config.num_hidden_layers)]]


@hookimpl(tryfirst=True)
def enumerate_layers(model: PreTrainedModel, asked: bool) -> list[Layer] | None:
    if not (asked or is_inkuba(model.config.to_dict())):
        return None
    blocks = [Layer(f"model.layers.{i}") for i in range(model.config.num_hidden_layers)]
    return [Layer.of_embedding(model), *blocks, Layer("model.norm"), Layer.of_head(model)]
