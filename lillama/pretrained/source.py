"""The model on disk: a skeleton on the meta device whose parts are materialised one at a time.

The whole model is never in memory. Weights come as slices of safetensors files through transformers'
own conversions, so hub formats that differ from the modules (fused experts, renamed keys) just work (DESIGN 8).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lillama.base.files import atomic_directory
from lillama.base.finite import extremes, finite, how_many
from lillama.base.rundir import ORIGINAL
from lillama.base.tensorfile import Lazy, TensorFile
from lillama.errors import LillamaError
from lillama.pretrained import gguf, identity, sharing
from lillama.pretrained.forms import Form
from lillama.pretrained.headers import index_of, open_files
from lillama.pretrained.locate import Place, download, explained, gguf_tokenizer
from lillama.recipe.schema import Model

PutDirectory = Callable[[str], AbstractContextManager[Path]]  # makes a directory of that name, whole or not at all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights_dtype(section: Model, config: Any) -> torch.dtype:
    """The type a recipe's model is evaluated and saved in."""
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


class Source:
    """An opened model: its configuration, its skeleton (`model`), and its weights on demand."""

    def __init__(
        self,
        section: Model,
        config: Any,
        place: Place,
        auto_class: Any = AutoModelForCausalLM,
        working: torch.dtype | None = None,
    ) -> None:
        """Build the skeleton of a recipe's model from its configuration; no weight is read.

        `place` is what `locate.resolve` says, or (id, None) of a model that is not at hand. `auto_class` is that of
        transformers which opens it. `working` is the type weights are held in while distilling (None: their own).
        """
        self.section, self.config = section, config
        self.where, self.gguf = place
        if getattr(self.config, "quantization_config", None) is not None:
            raise LillamaError(
                "the model is already quantised or compressed",
                where="model.id",
                hint="Start from its original.",
            )
        self.auto_class = auto_class
        self.dtype = weights_dtype(section, config)
        self.working = working or self.dtype
        self.shared: list[list[str]] = []  # see `share`
        self.forms: dict[str, Form] = {}  # of layers, by name, once they were learned (learn.py)
        self.aliases: dict[str, str] = {}
        self.model = self.skeleton()
        self.directory: Path | None = None  # of safetensors files, once `fetch` was called
        self._keys: dict[str, list[tuple[Path, str]]] = {}
        self._files: dict[Path, TensorFile] = {}
        self._identity: dict[str, Any] | None = None
        self._checked: set[str] = set()  # parameters whose numbers were looked at

    def skeleton(self) -> PreTrainedModel:
        """A fresh model on the meta device (buffers are real), in eval mode, weights tied."""
        trust = self.section.trust_remote_code
        with (
            explained(f"the model '{self.section.id}'", "model.id"),
            init_empty_weights(include_buffers=False),
        ):
            if hasattr(self.auto_class, "from_config"):
                model = self.auto_class.from_config(self.config, dtype=self.working, trust_remote_code=trust)
            else:  # a class of models, where no auto class opens this one
                model = self.auto_class._from_config(self.config, dtype=self.working)
        model.tie_weights()
        sharing.share(model, self.shared)
        return model.eval().requires_grad_(False)

    def share(self, groups: sharing.Groups) -> None:
        """Have the modules of each group be one; `fetch` sees to it that their copies in the files are equal."""
        self.shared = [list(group) for group in groups]
        sharing.share(self.model, self.shared)
        self.aliases = sharing.aliases(self.model, self.shared)

    def identity(self) -> dict[str, Any]:
        """What tells this model from others: a hub commit, or the content of local files (identity.py)."""
        if self._identity is None:  # all files are read for it
            commit = getattr(self.config, "_commit_hash", None)
            local = Path(self.where), self.gguf, self.section.trust_remote_code
            self._identity = {"id": self.where, "commit": commit} if commit else identity.of(*local)
        return self._identity

    @property
    def parameters(self) -> int:
        """Unique parameters of the model; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    def fetch(self, cache: Path, put: PutDirectory | None = None) -> Path:
        """Make the weights available as local safetensors files and index them.

        A hub model is downloaded to the hub's own cache; a GGUF file is unpacked once into `cache`, where `put` makes
        the directory of a name (None: atomic_directory).
        """
        if self.gguf:
            self.directory = unpack_gguf(self, cache, put or (lambda name: atomic_directory(cache / name)))
            gguf.forget()
        elif Path(self.where).is_dir():
            self.directory = Path(self.where)
        else:
            self.directory = download(self.where, self.section.revision)
        self._keys = self._index(self.directory)
        self._check_copies()
        return self.directory

    def _check_copies(self) -> None:
        """LillamaError unless the copies of shared parameters are equal; such as no file holds are the first."""
        for name, first in self.aliases.items():
            mine, theirs = self._keys.get(name), self._keys[first]
            if mine is None:
                self._keys[name] = theirs
                continue
            for (file, key), (other_file, other) in zip(mine, theirs, strict=True):
                if not torch.equal(self._files[file].read(key), self._files[other_file].read(other)):
                    raise LillamaError(
                        f"'{key}' and '{other}' are different, though the model is known to use one for both",
                        where=str(file),
                        hint="This is another model, or a damaged copy: use another plugin, or download it again.",
                    )

    def _index(self, directory: Path) -> dict[str, list[tuple[Path, str]]]:
        """Model key -> the file tensors it is made of."""
        self._files = open_files(directory)
        return index_of(self.model, self._files, directory, self.aliases)

    def tensors_below(self, prefixes: Iterable[str]) -> list[tuple[Path, str]]:
        """The file tensors that modules or parameters named by `prefixes` are made of."""
        prefixes = tuple(prefixes)
        dotted = tuple(f"{p}." for p in prefixes)
        return [t for key, ts in self._keys.items() if key in prefixes or key.startswith(dotted) for t in ts]

    @property
    def index(self) -> dict[str, list[tuple[Path, str]]]:
        """Model key -> (file, key in the file) of every tensor it is made of."""
        return self._keys

    def materialise(self, prefixes: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Read the modules named by `prefixes` from disk into the skeleton, on `device`."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        prefixes = tuple(prefixes)
        tied = self._tied_below(prefixes)
        absent = {stored for stored in tied.values() if self.model.get_parameter(stored).is_meta}
        state = {key: Lazy(self._files[file], key) for file, key in self.tensors_below([*prefixes, *absent])}
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.working,
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        logging.disable_progress_bar()
        info, _ = convert_and_load_state_dict_in_model(self.model, state, settings)
        if info.conversion_errors or info.mismatched_keys or info.error_msgs:
            trouble = info.conversion_errors or info.mismatched_keys or info.error_msgs
            raise LillamaError(f"tensors do not fit the model: {trouble}", where=str(self.directory))
        for name, stored in tied.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.model.get_parameter(stored))
            if stored in absent and not stored.startswith(tuple(f"{p}." for p in prefixes)) and stored not in prefixes:
                self.release_keys([stored])
        self._make_rest(prefixes, device)
        self.model.requires_grad_(False)
        self._check_numbers(prefixes)

    def _make_rest(self, prefixes: tuple[str, ...], device: torch.device | str) -> None:
        """Have the model's class fill what no file holds, since it is no result of training (positions, say)."""
        dotted = tuple(f"{p}." for p in prefixes)
        for name, parameter in list(self.model.named_parameters()):
            known = name in self._keys or not parameter.is_meta
            if not known and (name in prefixes or name.startswith(dotted)):
                module = self.model.get_submodule(name.rpartition(".")[0])
                module._parameters[name.rpartition(".")[2]] = nn.Parameter(torch.empty_like(parameter, device=device))
                self.model._init_weights(module)

    def _check_numbers(self, prefixes: tuple[str, ...]) -> None:
        """LillamaError for the first parameter below `prefixes` whose numbers are not finite, once for each of them.

        Nor may any be too large for the type that the model is saved in. A device is waited for once.
        """
        dotted = tuple(f"{p}." for p in prefixes)
        named = self.model.named_parameters()
        new = {k: p for k, p in named if (k in prefixes or k.startswith(dotted)) and k not in self._checked}
        held = {k: p.detach() for k, p in new.items() if not p.is_meta}
        self._checked.update(held)
        good = [finite(extremes(tensor).to(self.dtype)) for tensor in held.values()]
        for (name, tensor), fine in zip(held.items(), torch.stack(good).tolist() if good else []):
            if not fine:
                bad = how_many(tensor.to(self.dtype))
                files = {str(file) for file, _ in self._keys.get(name, [])} or {str(self.directory)}
                raise LillamaError(
                    f"{bad} not finite in the original's weight '{name}', in {str(self.dtype).removeprefix('torch.')}",
                    where=", ".join(sorted(files)),
                    hint="The file may be damaged: download it again. Where model.dtype is float16, try float32.",
                )

    def _tied_below(self, prefixes: tuple[str, ...]) -> dict[str, str]:
        """Parameters below `prefixes` that no file holds -> those they are tied to."""
        dotted = tuple(f"{p}." for p in prefixes)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {k: v for k, v in tied.items() if k not in self._keys and (k in prefixes or k.startswith(dotted))}

    def prefetch(self, prefixes: Iterable[str]) -> None:
        """Have the system read the modules named by `prefixes` in the background, for a `materialise` to come.

        They go into the system's file cache: no memory of this process, or of the device, is taken.
        """
        wanted: dict[Path, list[str]] = {}
        for file, key in self.tensors_below(prefixes):
            wanted.setdefault(file, []).append(key)

        def read() -> None:
            with contextlib.suppress(OSError):  # whoever needs the file will say what is wrong with it
                for file, keys in wanted.items():
                    self._files[file].warm(keys)

        threading.Thread(target=read, name="prefetch", daemon=True).start()

    def release(self, module: nn.Module) -> None:
        """Put the parameters of `module` back on the meta device."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )

    def release_keys(self, keys: Iterable[str]) -> None:
        """Put single parameters, by their dotted names, back on the meta device."""
        for key in keys:
            parent, _, name = key.rpartition(".")
            module = self.model.get_submodule(parent)
            parameter = module._parameters[name]
            assert parameter is not None
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    def place_buffers(self, device: torch.device) -> None:
        """Move the skeleton's buffers (rotary frequencies and the like), which are always real, to `device`."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def outside(self, names: Iterable[str], predicts: bool = False) -> list[str]:
        """Parameters outside the modules `names`: what the model needs to feed its first layer.

        An output head of its own is left out, which no layer needs, unless the model is to predict.
        """
        names = tuple(f"{name}." for name in names)
        head = None if predicts else _unless_lacking(self.model.get_output_embeddings)
        # Some name a table there that tokens are looked up in, which feeds layers.
        alone = isinstance(head, nn.Module) and not isinstance(head, nn.Embedding)
        theirs = {id(module) for module in head.modules()} if head is not None and alone else set()
        not_needed = {name for name, module in self.model.named_modules() if id(module) in theirs}
        return [
            key
            # A tied parameter is filled under each of its names: on the meta device they are several.
            for key, _ in self.model.named_parameters(remove_duplicate=False)
            if not key.startswith(names) and key.rpartition(".")[0] not in not_needed
        ]


def _unless_lacking(getter: Callable[[], Any]) -> Any | None:
    """What a model says of its embeddings; None where it has none to name."""
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None


def unpack_gguf(source: Source, cache: Path, put: PutDirectory) -> Path:
    """Dequantise a GGUF model into `cache/original` as safetensors, once, with its tokenizer."""
    import io

    from transformers import GgufConfig

    directory = cache / ORIGINAL
    if directory.exists():
        return directory
    with (
        explained(f"the GGUF file '{source.gguf}'", "model.gguf_file"),
        gguf.read_once(),
        put(ORIGINAL) as temporary,
        contextlib.redirect_stderr(io.StringIO()),  # transformers' bars, which nothing else turns off
    ):
        model = source.auto_class.from_pretrained(
            source.where,
            config=copy.deepcopy(source.config),  # read already, which takes seconds
            gguf_file=source.gguf,
            dtype=source.dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        gguf_tokenizer(source.where, source.gguf, source.section.revision).save_pretrained(temporary)
    return directory
