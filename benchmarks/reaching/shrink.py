"""Small configurations: of any class that transformers has, one whose model has all its kinds of blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from reaching import rules, special

# Attributes that count a configuration's layers, the likeliest first.
COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth",
)  # fmt: skip


def shrink(config_class: type[Any], **given: Any) -> Any:
    """A small configuration of `config_class`: width 64, two to four layers, four heads, a vocabulary of 128.

    Nested configurations become small too; what holds one entry per layer is cut to those that are kept. `given`
    takes the place of what the rules say.
    """
    default = config_class(**special.needed(config_class))
    changed = {**_smaller(default), **special.given(config_class), **given}
    config = _made(config_class, default, changed)
    _cut(config)
    return config


def _made(config_class: type[Any], default: Any, changed: dict[str, Any]) -> Any:
    """The configuration of what was changed alone, so that what follows from it is derived anew."""
    try:
        return config_class(**special.needed(config_class) | changed)
    except Exception:  # a class whose checks want all that is derived too
        config = copy.deepcopy(default)
        for name, value in changed.items():
            setattr(config, name, value)
        return config


def _values(config: Any) -> dict[str, Any]:
    names = config.attribute_map if hasattr(config, "attribute_map") else {}
    return {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in names}


def _smaller(config: Any) -> dict[str, Any]:
    """The attributes of `config` that become smaller, with what they become."""
    changed: dict[str, Any] = {}
    values = _values(config)
    kept = _kept(values)
    layers = next((values[name] for name in COUNTS if isinstance(values.get(name), int)), None)
    high = iter(range(rules.VOCABULARY - 1, 0, -1))
    for name, value in values.items():
        new = value
        if hasattr(value, "to_dict"):
            new = shrink_nested(value)
        elif name in COUNTS and isinstance(value, int):
            new = len(kept) if value == layers and kept else min(value, 2)
        elif rules.TOKEN.fullmatch(name):
            new = _token(name, value, high)
        elif isinstance(value, (list, tuple)):
            new = _list(name, value, layers, kept)
        elif isinstance(value, int) and not isinstance(value, bool):
            new = rules.size(name, value)
        if hasattr(value, "to_dict") or new != value:
            changed[name] = new
    return changed | _bound(values, changed)


def _bound(values: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What must agree with other sizes: heads of keys with heads, a head with its parts."""
    found = {}
    heads = {value for name, value in values.items() if rules.COUNT_OF_HEADS.fullmatch(name)}
    for name in changed:
        if rules.COUNT_OF_KEYS.fullmatch(name) and values[name] in heads:
            found[name] = rules.HEADS
    if "qk_rope_head_dim" in values:
        rope = changed.get("qk_rope_head_dim", values["qk_rope_head_dim"])
        nope = changed.get("qk_nope_head_dim", values.get("qk_nope_head_dim")) or 0
        whole = {"head_dim": {values["qk_rope_head_dim"]: rope}, "qk_head_dim": {}}
        for name, known in whole.items():
            if name in changed and (nope or values[name] in known):
                found[name] = known.get(values[name], rope + nope)
    return found


def shrink_nested(config: Any) -> Any:
    """A small copy of a configuration inside another one, with what its owner set kept where it is no size."""
    small = copy.deepcopy(config)
    changed = {**_smaller(config), **special.given(type(config))}
    try:
        default = type(config)()
    except Exception:
        default = config
    own = {k: v for k, v in _values(config).items() if k not in changed and _values(default).get(k) != v}
    try:
        small = type(config)(**own | changed)
    except Exception:
        for name, value in changed.items():
            setattr(small, name, value)
    _cut(small)
    return small


def _token(name: str, value: Any, high: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(rules.SPECIAL.get(name, 2) for _ in value[:1])
    if value is None or (isinstance(value, int) and value < 0):
        return value
    return rules.SPECIAL[name] if name in rules.SPECIAL else next(high)


def _kept(values: dict[str, Any]) -> list[int]:
    """Which layers stay: the first of every kind, in their order; two at least, four at most."""
    count = next((values[name] for name in COUNTS if isinstance(values.get(name), int)), 0)
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count > 2]
    indices = [v for n, v in values.items() if _holds_indices(n, v)]
    kinds: dict[Any, int] = {}
    for i in range(count):
        kinds.setdefault((*(str(one[i]) for one in lists), *(i in one for one in indices)), i)
    kept = sorted(kinds.values())[: rules.LAYERS]
    return sorted({*kept, *range(min(2, count))} if len(kept) < 2 else kept)


def _holds_indices(name: str, value: Any) -> bool:
    said = ("moe_layers", "mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "hybrid_layer_ids")
    return name in (*said, "intermediate_layers_indices", "global_attn_indexes") and isinstance(value, (list, tuple))


def _list(name: str, value: Sequence[Any], layers: int | None, kept: list[int]) -> Any:
    if _holds_indices(name, value):
        return type(value)(kept.index(i) for i in value if i in kept)
    if layers and len(value) == layers and layers > 2 and kept:
        value = type(value)(value[i] for i in kept)
    if name in ("attention_window", "intermediate_size", "num_attention_heads_per_layer"):
        limit = {"attention_window": 8, "intermediate_size": rules.INNER}.get(name, rules.HEADS)
        return type(value)(limit for _ in value)
    return value


def _cut(config: Any) -> None:
    """Cut what still has an entry for more layers than there are."""
    values = _values(config)
    count = next((values[name] for name in COUNTS if isinstance(values.get(name), int)), None)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        held = values.get(name)
        if count and isinstance(held, list) and len(held) > count:
            setattr(config, name, held[:count])
