"""Whether a checkpoint without a manifest is whole, as far as that can be told without reading its weights."""

from __future__ import annotations

from pathlib import Path

from lillama.checkpoint.load import AGAIN, class_of
from lillama.errors import LillamaError
from lillama.pretrained.vetted import check_config, check_directory, read_object


def check(directory: Path) -> str | None:
    """What could not be checked, if anything; LillamaError where headers, index and config.json do not go together."""
    from accelerate import init_empty_weights

    from lillama.checkpoint.open import is_compressed
    from lillama.checkpoint.quantizer import LillamaConfig, LillamaQuantizer
    from lillama.pretrained.headers import index_of, open_files
    from lillama.pretrained.locate import explained, read_configuration

    where = directory / "config.json"
    raw = read_object(where)
    check_config(raw, str(where))
    check_directory(directory)
    files = open_files(directory)
    with explained("the configuration", str(where), AGAIN):
        config = read_configuration(directory)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not is_compressed(config):
        return "shapes, since another method quantised it"
    try:
        known = class_of(raw, where, trust=False)
    except LillamaError:
        if raw.get("auto_map"):
            return "shapes, since that takes the model's own code"
        raise
    with explained("the checkpoint", str(where), AGAIN):
        if quantised is not None:
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = known._from_config(config)
        if quantised is not None:
            quantizer = LillamaQuantizer(LillamaConfig(**{k: v for k, v in quantised.items() if k != "quant_method"}))
            quantizer._process_model_before_weight_loading(model)
    index_of(model, files, directory)
    return None
