"""`lillama export --standalone`: a checkpoint with its own modelling file, which transformers loads without lillama.

The weights are those of the checkpoint, file by file. config.json has no `quantization_config`, for which transformers
would ask lillama, but `low_rank`, which the modelling file reads, and `auto_map`, which names that file. The file
consists of the very texts that compute here, so that the numbers are the same to the last bit.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

from lillama.base.files import atomic_directory
from lillama.checkpoint import seal
from lillama.errors import LillamaError
from lillama.version import __version__

FILE = "modeling_lillama"
KEY = "low_rank"
STORAGES = ("factors", "pivoted")
PARTS = ("lillama.lowrank.permute", "lillama.lowrank.arithmetic", "lillama.checkpoint.carried")
WITH_EXPERTS = (
    *PARTS[:2],
    "lillama.lowrank.grouped",
    "lillama.dense.between",
    PARTS[2],
    "lillama.checkpoint.carried_experts",
)


def export_standalone(path: str | Path, target: str | Path, *, trust_remote_code: bool = False) -> None:
    """Write the compressed checkpoint in `path` so that transformers alone loads it, by `trust_remote_code=True`.

    Raises LillamaError, with the module's name, where one has no counterpart there: a storage of a plugin
    or of few bits, an embedding that does something of its own with its vectors.
    """
    from lillama.checkpoint.load import check_whole
    from lillama.checkpoint.write import copy_beside

    path, target = Path(path), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LillamaError("the directory exists and is not empty", where=str(target), hint="Name a new one.")
    config = check_whole(path, trust_remote_code)
    if not config.get("quantization_config"):
        raise LillamaError("this checkpoint holds no factors", where=str(path))
    low_rank = _described(path, config, trust_remote_code)
    own = _own_code(config)
    name = str(config["architectures"][0])
    config.pop("quantization_config")
    config[KEY] = low_rank
    autos = [own[name][0]] if name in own else _auto_classes(config["model_type"], name)
    config["auto_map"] = {**(config.get("auto_map") or {}), **dict.fromkeys(autos, f"{FILE}.{name}")}
    if target.exists():
        target.rmdir()
    with atomic_directory(target) as directory:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (directory / f"{FILE}.py").write_text(_modelling(name, low_rank, own), encoding="utf-8")
        for file in path.iterdir():
            if file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(file, directory / file.name)
        copy_beside(path, directory)
        _write_card(path / "README.md", directory / "README.md")
        seal.seal(directory)


def _described(path: Path, config: dict[str, Any], trust: bool) -> dict[str, Any]:
    """What the modelling file is told of every module. The model is built without numbers, before and after."""
    from accelerate import init_empty_weights

    from lillama.checkpoint.load import class_of
    from lillama.checkpoint.quantizer import LillamaConfig, LillamaQuantizer, renamed
    from lillama.lowrank.swap import factor_modules, markers
    from lillama.pretrained.locate import explained, read_configuration

    where = str(path / "config.json")
    with explained("the checkpoint", where):
        settings = read_configuration(path, trust=trust)
        quantised: Any = settings.quantization_config
        held = quantised if isinstance(quantised, dict) else quantised.to_dict()
        del settings.quantization_config
        auto = class_of(config, path / "config.json", trust)
        with init_empty_weights(include_buffers=False):
            given = {"trust_remote_code": trust} if hasattr(auto, "from_config") else {}
            model = (auto.from_config if given else auto._from_config)(settings, **given)
        known = LillamaConfig(**{k: v for k, v in held.items() if k != "quant_method"})
        model.config.architectures = config["architectures"]
        LillamaQuantizer(known)._process_model_before_weight_loading(model)
    found: dict[str, Any] = {}
    marks: dict[str, list[int]] = {}
    for name, module in factor_modules(model):
        found[name] = _of_module(name, module, known.modules)
        marks |= {key: list(tensor.shape) for key, tensor in markers(name, module.kind).items()}
    more = {key: getattr(known, key) for key in ("shared", "shapes") if getattr(known, key, None)}
    ignored = sorted({*marks, *renamed(model, list(marks))})
    return {"lillama": __version__, "modules": found, "markers": marks, "ignored": ignored, **more}


def _of_module(name: str, module: Any, said: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The description of a factor module. Raises LillamaError for one that cannot be carried."""
    from lillama.lowrank.embedding import LowRankEmbedding
    from lillama.lowrank.rounded import read_name

    each = {
        inside: {"storage": matrix.storage.name, "rank": matrix.rank, "shape": list(matrix.shape)}
        for inside, matrix in module.matrices().items()
    }
    for inside, one in each.items():
        if read_name(one["storage"]):
            raise _refused(name, inside, f"its storage '{one['storage']}' is one of few bits")
        if one["storage"] not in STORAGES:
            raise _refused(name, inside, f"the storage '{one['storage']}' is a plugin's")
    if module.kind == "experts":
        layout = module.layout
        fields = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
        dense = {p: {"shape": list(getattr(module, f"{p}_W").shape)} for p in layout.projections if p not in each}
        return {"kind": "experts", "between": fields, "projections": {**each, **dense}}
    if module.kind == "embedding" and type(module) is not LowRankEmbedding:
        raise _refused(name, "", f"a {module.dense_class.__name__} does something of its own with its vectors")
    tied = said[name].get("tied")
    return {"kind": module.kind, **each[""], **({"tied": tied} if tied else {})}


def _refused(name: str, inside: str, why: str) -> LillamaError:
    return LillamaError(
        f"this module cannot stand without lillama: {why}",
        where=f"{name}.{inside}" if inside else name,
        hint="--dense multiplies the factors back.",
    )


def _own_code(config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Classes of the original's own modelling code: name -> (the auto class, the file)."""
    found = {}
    for auto, code in (config.get("auto_map") or {}).items():
        if auto.startswith("AutoModel") and isinstance(code, str) and "--" not in code:
            file, _, name = code.rpartition(".")
            found[name] = (auto, file)
    return found


def _auto_classes(model_type: str, name: str) -> list[str]:
    """The auto classes of transformers that open a model of this type as the class `name`."""
    from transformers.models.auto import modeling_auto

    found = []
    for auto in filter(inspect.isclass, vars(modeling_auto).values()):
        names = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {})
        if names.get(model_type) == name:
            found.append(auto.__name__)
    if not found:
        raise LillamaError(f"no auto class of transformers opens a {name}", where="architectures")
    return found


def _modelling(name: str, low_rank: dict[str, Any], own: dict[str, tuple[str, str]]) -> str:
    """The text of the modelling file."""
    experts = any(how["kind"] == "experts" for how in low_rank["modules"].values())
    imports, bodies = set(), []
    for part in WITH_EXPERTS if experts else PARTS:
        more, body = _split(_text(part))
        imports |= more
        bodies.append(body)
    if name in own:
        base, local = "Original", f"from .{own[name][1]} import {name} as Original\n"
    else:
        base, local = f"transformers.{name}", ""
        imports.add("import transformers")
    lines = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return (
        f'"""The low-rank modules of this checkpoint, for transformers alone: written by lillama {__version__}.\n\n'
        "Apache-2.0. It is a copy of those parts of lillama that compute; lillama itself is not needed.\n"
        '"""\n\nfrom __future__ import annotations\n\n'
        + "\n".join(lines)
        + f"\n{local}\n\n"
        + "\n\n\n".join(bodies)
        + f'\n\n\nclass {name}(LowRankModel, {base}):\n    """{name} with the modules that config.json names of low '
        'rank."""\n'
    )


def _text(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8")


def _split(text: str) -> tuple[set[str], str]:
    """(the imports of a module but those of lillama, what follows them)."""
    tree, lines, end = ast.parse(text), text.splitlines(), 0
    imports = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith(("lillama", "__future__"))):
                imports.add(ast.unparse(node))
            end = node.end_lineno or end
    return imports, "\n".join(lines[end:]).strip()


def _write_card(old: Path, new: Path) -> None:
    """The model card, which says how this checkpoint is opened."""
    if not old.is_file():
        return
    text = re.sub(r"^import lillama\b.*\n", "", old.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = text.replace('from_pretrained("PATH_OR_ID")', 'from_pretrained("PATH_OR_ID", trust_remote_code=True)')
    new.write_text(text, encoding="utf-8")
