"""`lillama doctor`: what is installed, which device and kernels are used, what recipes lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lillama import host, registry
from lillama.errors import LillamaError
from lillama.version import __version__

# Beyond what the distribution itself names: what a GPU may use, and must match torch's build.
BESIDE = {"torchaudio": "audio on a GPU; must match torch's build", "flash-attn": "attention kernels"}
OURS = "lillama"


def report(recipes: list[str]) -> RenderableType:
    """Everything a person needs to know about this environment, as text."""
    return Group(
        _heading("versions"), _versions(), Text(),
        _heading("device"), *_device(), Text(),
        _heading("plugins"), *_plugins(), Text(),
        _heading("recipes"), _recipes(recipes),
    )  # fmt: skip


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _table() -> Table:
    return Table(box=None, show_header=False, pad_edge=False)


def _versions() -> Table:
    table = _table()
    table.add_row("lillama", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    needed, optional = _requirements()
    for name in needed:
        table.add_row(name, _version(name) or "MISSING")
    for name, what in {**optional, **BESIDE}.items():
        table.add_row(name, _version(name) or f"not installed (optional: {what})")
    return table


def _requirements() -> tuple[list[str], dict[str, str]]:
    """The packages that lillama needs, and those of an extra with its name, as its own metadata say."""
    from packaging.requirements import Requirement

    needed, optional = [], {}
    for text in (_version(OURS) and importlib.metadata.requires(OURS)) or ():
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"]([^'\"]+)", str(requirement.marker or ""))
        if extra is None:
            needed.append(requirement.name)
        elif extra[1] != "dev":
            optional[requirement.name] = f"extra {extra[1]}"
    return needed, optional


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> list[Text]:
    import psutil
    import torch

    from lillama.base.device import fast_bfloat16

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    lines = [
        f"memory {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free; "
        f"disk {disk.free / 2**30:.1f} GiB free here",
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
        f"bfloat16 products in hardware: {'yes' if fast_bfloat16(torch.device('cpu')) else 'no, float32 is used'}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    else:
        lines.append(f"CUDA: none (torch {torch.__version__})")
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    attention = "flash-attn" if importlib.util.find_spec("flash_attn") else "torch's scaled_dot_product_attention"
    lines.append(f"attention: {attention}")
    return [Text(line) for line in lines]


def _plugins() -> list[Text]:
    lines = []
    for name in registry.PLUGINS:
        plugin = host.get().plugins[name]
        lines.append(f"{plugin}: {plugin.failure or 'ready'}")
        if "doctor" in plugin.hooks and not plugin.failure:
            lines += [f"  {line}" for line in host.get().doctor(plugin)]
    return [Text(line) for line in lines] or [Text("none installed")]


def _recipes(paths: list[str]) -> Table:
    from lillama.recipe.schema import Recipe

    table = _table()
    files = [Path(p) for p in paths] or sorted(Path("recipes").glob("**/*.yaml"))
    for file in files:
        try:
            lacks = _lacks(Recipe.load(file))
        except LillamaError as error:
            lacks = [str(error)]
        table.add_row(str(file), "; ".join(lacks) or "ready")
    if not files:
        table.add_row("no recipes/*.yaml here; name some")
    return table


def _lacks(recipe: Any) -> list[str]:
    """What keeps a recipe from running here."""
    from lillama.pretrained.locate import resolve

    lacks = []
    try:
        where, _ = resolve(recipe.model)
        if not Path(where).is_dir() and not _cached(where, "model"):
            lacks.append(f"needs the hub for the model {where}")
    except LillamaError as error:
        lacks.append(error.what)
    datasets = [part.dataset for part in recipe.calibration.parts]
    datasets += recipe.finetune.named_data.values() if recipe.finetune is not None else ()
    for dataset in datasets:
        if dataset.startswith("package:"):
            if importlib.util.find_spec(dataset.removeprefix("package:").partition(".")[0]) is None:
                lacks.append(f"needs the module {dataset}")
        elif not Path(dataset).expanduser().exists() and not _cached(dataset, "dataset"):
            lacks.append(f"needs the hub for the data set {dataset}")
    if recipe.plugin != "auto" and recipe.plugin not in registry.PLUGINS:
        lacks.append(f"needs the plugin {recipe.plugin}")
    return lacks


def _cached(repo: str, kind: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}").is_dir()
