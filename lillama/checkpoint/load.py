"""The compressed checkpoint, loaded strictly (docs/checkpoint.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lillama.checkpoint import seal
from lillama.errors import LillamaError
from lillama.pretrained.vetted import check_config, check_directory, read_object

AGAIN = "The checkpoint is damaged or incomplete; write it again."


def load(path: str | Path, *, trust_remote_code: bool = False, verify: bool = False, **options: Any) -> Any:
    """Load a checkpoint written by a run, strictly.

    `trust_remote_code` allows the checkpoint's own modelling code to run, where the original came with some; `verify`
    first compares every file with the hash that the checkpoint's manifest has of it; other `options` go to
    `from_pretrained` (dtype, device_map, ...). Raises LillamaError when the directory is not such a checkpoint, or when
    any tensor is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    config = check_whole(path, trust_remote_code, verify)
    where = path / "config.json"
    model, info = _read(path, class_of(config, where, trust_remote_code), trust_remote_code, options)
    troubles = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if troubles:
        kind, names = next(iter(troubles.items()))
        raise LillamaError(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}",
            where=str(path),
            hint=AGAIN,
        )
    return model


def check_whole(path: Path, trust: bool = False, verify: bool = False) -> dict[str, Any]:
    """What config.json says, once it is clear that a checkpoint is here and none of its files is cut short.

    `trust` and `verify` are as for `load`, which raises the same errors.
    """
    if not (path / "config.json").is_file():
        hint = f"Did you mean '{path / 'model'}'?" if (path / "model" / "config.json").is_file() else None
        raise LillamaError("there is no checkpoint here (no config.json)", where=str(path), hint=hint)
    _check_seal(path, verify)
    check_directory(path)
    config = read_object(path / "config.json")
    check_config(config, str(path / "config.json"), trust)
    _check_method(config, str(path / "config.json"))
    return config


def _read(path: Path, auto: Any, trust: bool, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from lillama.pretrained.headers import open_files
    from lillama.pretrained.locate import explained

    open_files(path)  # whatever is wrong with them is said by their names
    given = {"dtype": "auto", **options, "use_safetensors": True, "trust_remote_code": trust}
    try:
        with explained("the checkpoint", str(path), AGAIN):
            return auto.from_pretrained(path, output_loading_info=True, **given)
    except LillamaError as error:
        if isinstance(error.__cause__, RuntimeError):  # transformers on wrong shapes
            raise LillamaError(f"the weights do not fit: {error.__cause__}", where=str(path), hint=AGAIN) from error
        error.where = error.where or str(path / "config.json")
        raise


def _check_seal(path: Path, verify: bool) -> None:
    found = seal.damaged(path) if verify else seal.cut_short(path)
    if found is None:
        raise LillamaError(
            f"it cannot be verified: there is no {seal.NAME}",
            where=str(path),
            hint="It was written by an earlier version, or saved by other means; load it without verify.",
        )
    if found:
        raise LillamaError(
            f"this is not as it was written: {'; '.join(found[:5])}{' ...' if len(found) > 5 else ''}",
            where=str(path),
            hint=f"Copy it again; where you changed it yourself, remove {seal.NAME}.",
        )


def _check_method(config: dict[str, Any], where: str) -> None:
    """LillamaError for a model that another method quantised: what loads that is not what is checked here."""
    method = (config.get("quantization_config") or {"quant_method": "lillama"}).get("quant_method")
    if method != "lillama":
        raise LillamaError(
            f"it was quantised by {method!r}, not written by lillama",
            where=f"{where}: quantization_config.quant_method",
            hint="transformers opens such models: AutoModelForCausalLM.from_pretrained.",
        )


def class_of(config: dict[str, Any], where: Path, trust: bool) -> Any:
    """What opens a checkpoint: the class of transformers that it names, or, trusted, the one its own code has."""
    import transformers

    name = str((config.get("architectures") or [None])[0])
    own = {str(code).rpartition(".")[2]: str(auto) for auto, code in (config.get("auto_map") or {}).items()}
    if name in own and trust:
        auto = getattr(transformers, own[name], None)
        if own[name].startswith("Auto") and hasattr(auto, "from_pretrained"):
            return auto
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise LillamaError(
        f"transformers has no model class '{name}'",
        where=str(where),
        hint="It comes with the model's own code: trust_remote_code=True runs that." if name in own else None,
    )
