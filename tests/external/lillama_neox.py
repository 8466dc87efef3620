"""GPT-NeoX and Pythia for lillama: every linear of a block may be factorised."""

from lillama import Layer, hookimpl

GROUPS = (
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)


@hookimpl
def enumerate_layers(model):
    if model.config.model_type != "gpt_neox":
        return None
    names = [f"gpt_neox.layers.{i}" for i in range(model.config.num_hidden_layers)]
    blocks = [Layer.of_linears(model, name, GROUPS) for name in names]
    return [Layer("gpt_neox.embed_in", kind="embedding"), *blocks]
