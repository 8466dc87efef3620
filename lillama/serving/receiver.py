"""Takes a layer's tensors as an engine hands them over, one by one, and keeps of each what this process computes.

The engine finds tensors by names: `q_proj.A` of the file is handed to the parameter `A` of the layer `qkv_proj`, with
the shard "q". So a layer gets an empty parameter for every suffix that a matrix may have. How big the tensors are, and
which of them come, is not asked beforehand: what came says it, so the engine's names for layers need not be the file's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lillama.errors import LillamaError
from lillama.lowrank.rounded import CODES
from lillama.lowrank.whole import NAME as DENSE
from lillama.serving.parts import (
    SUFFIXES,
    TENSORS,
    Part,
    check_shapes,
    matrices_of,
    padded,
    part_of,
    size_of,
    storage_of,
    type_of,
)
from lillama.serving.products import Products

AGAIN = "The checkpoint is damaged or incomplete; write it again."
Load = Callable[..., Any]


class Receiver:
    """The matrices of one layer of the engine, by shard: None where the layer is one matrix."""

    make: Callable[[list[Part], torch.dtype, torch.device, str], nn.Module] = Products
    """What multiplies by the matrices, of these; the last is the layer's name."""

    def __init__(self, layer: Any, name: str, outputs: int, dtype: torch.dtype, needed: int | None = None) -> None:
        """`outputs`: how many the layer has in this process; `needed` of them (None: all) are not padding."""
        self.layer, self.name, self.outputs, self.dtype = layer, name, outputs, dtype
        self.needed = outputs if needed is None else needed
        self.narrows = False  # whether matrices may have fewer outputs, or inputs, than the engine made the layer for
        self.tied_to: Receiver | None = None
        self.parts: dict[Any, Part] = {}
        self.low_rank = 0  # how many matrices of low rank or in few bits came
        self._waiting: dict[Any, dict[str, Tensor]] = {}
        self._load: Load = layer.weight_loader  # knows which rows and columns of a shard are this process's
        self.device = torch.empty(0).device
        for suffix in SUFFIXES:
            empty = torch.empty(0, dtype=type_of(suffix, dtype))
            parameter = nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = functools.partial(self.take, suffix)  # type: ignore[attr-defined]
            layer.register_parameter(suffix, parameter)
        layer.weight_loader = self._load_bias

    def expect(self, codes: torch.dtype) -> None:
        """Let what stands for codes be of this type."""
        for suffix in SUFFIXES:
            if suffix.endswith(CODES):
                getattr(self.layer, suffix).data = torch.empty(0, dtype=codes)

    def take(self, suffix: str, parameter: Any, tensor: Tensor, shard: Any = None) -> None:
        """Take over one tensor of a matrix. Raises LillamaError where it is none of what the matrix needs."""
        if suffix == "weight" and tensor.numel() == 0:
            return  # stands for a dense weight that is gone (docs/checkpoint.md)
        held = self._waiting.setdefault(shard, {})
        if suffix in held or shard in self.parts:
            raise LillamaError(f"'{suffix}' came twice", where=self._where(shard), hint=AGAIN)
        held[suffix] = tensor
        if (storage := storage_of(held)) is not None:
            self.parts[shard] = self._part(self._waiting.pop(shard), shard)
            self.low_rank += storage != DENSE

    def _part(self, tensors: dict[str, Tensor], shard: Any) -> Part:
        try:
            matrices = matrices_of(tensors)
            check_shapes(matrices)
            rows, columns = self._own(size_of(matrices), shard)
            part = part_of(matrices, rows, columns)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise LillamaError(
                f"a matrix of {size_of(matrices)} does not fit: {error}", where=self._where(shard), hint=AGAIN
            ) from error
        except LillamaError as error:
            raise LillamaError(error.what, where=self._where(shard), hint=AGAIN) from error
        # What is in few bits goes to its place when it is laid out for the product there.
        moved = [t.to(self.device, self.dtype) if isinstance(t, Tensor) else t for t in (part.first, part.second)]
        return Part(moved[0], moved[1], part.source)  # type: ignore[arg-type]

    def _own(self, size: tuple[int, int], shard: Any) -> tuple[Tensor, Tensor | None]:
        """(1 + row of the matrix for each output of the layer, columns): the engine puts row numbers where rows go."""
        d_out, d_in = size
        if self.narrows and (fewer := self._own_of_narrow(size, shard)) is not None:
            return fewer, None
        shards = () if shard is None else (shard,)
        rows = _Probe(torch.zeros(self.outputs, dtype=torch.long, device="cpu"), requires_grad=False)
        rows.output_dim = 0
        self._load(rows, torch.arange(1, d_out + 1, device="cpu"), *shards)
        here = getattr(self.layer, "input_size_per_partition", d_in)
        if here == getattr(self.layer, "input_size", here):
            if here != d_in:
                raise ValueError(f"the layer has {here} inputs")
            return rows.data, None
        columns = _Probe(torch.zeros(here, dtype=torch.long, device="cpu"), requires_grad=False)
        columns.input_dim = 0
        self._load(columns, torch.arange(d_in, device="cpu"))
        return rows.data, columns.data

    def _own_of_narrow(self, size: tuple[int, int], shard: Any) -> Tensor | None:
        """The rows of a matrix that lost neurons, each in its place among those of the layer; None: it lost none.

        The layer then has fewer outputs than it was made for, which what comes behind it takes as they are.
        """
        sizes, number = self._sizes, shard or 0
        if size == (sizes[number], self.layer.input_size):
            return None
        if getattr(self.layer, "tp_size", 1) > 1:
            raise ValueError("neurons of this MLP were removed: it cannot be split between processes")
        d_out, d_in = size
        if d_out > sizes[number] or d_in > self.layer.input_size:
            raise ValueError(f"the layer has {self.layer.input_size} inputs and {sizes[number]} outputs")
        self.outputs = self.needed = d_out * len(sizes)
        if any(len(part.source) != self.outputs for part in self.parts.values()):
            raise ValueError("its neighbour has another number of neurons")
        rows = torch.zeros(self.outputs, dtype=torch.long, device="cpu")
        rows[number * d_out : (number + 1) * d_out] = torch.arange(1, d_out + 1, device="cpu")
        return rows

    def _load_bias(self, parameter: Any, tensor: Tensor, shard: Any = None, **more: Any) -> Any:
        """The engine's own loader, for all but our tensors.

        An engine that makes a bias of zeros where the file has none measures it by the dense weight that is gone.
        """
        shards = () if shard is None else (shard,)
        if self.narrows and tensor.dim() == 1 and self._is_short(tensor, shard):
            hint = "`lillama export DIR OUT --dense` writes a model that any engine serves."
            raise LillamaError("a bias of an MLP that lost neurons cannot be served", where=self.name, hint=hint)
        if tensor.numel() == 0 and parameter.numel():
            number = {"q": 0, "k": 1, "v": 2}.get(shard, shard or 0)
            tensor = tensor.new_zeros(self._sizes[number])
        return self._load(parameter, tensor, *shards, **more)

    def _is_short(self, bias: Tensor, shard: Any) -> bool:
        return 0 < len(bias) < self._sizes[shard or 0]

    @property
    def _sizes(self) -> list[int]:
        """Outputs of each matrix of the layer, as the engine made it."""
        return list(getattr(self.layer, "output_sizes", [self.layer.output_size]))

    def check(self) -> None:
        """LillamaError that names what did not come, unless every output of the layer has its matrix."""
        for shard, held in self._waiting.items():
            kinds = [suffixes for suffixes in TENSORS.values() if set(held) < set(suffixes)]
            wanted = min(kinds, key=lambda suffixes: len(set(suffixes) - set(held)), default=())
            lacking = [suffix for suffix in wanted if suffix not in held]
            what = f"{', '.join(lacking)} did not come" if lacking else "its tensors are those of two storages"
            raise LillamaError(f"{', '.join(held)} came, but {what}", where=self._where(shard), hint=AGAIN)
        missing = self.needed - sum(int((part.source > 0).sum()) for part in self.parts.values())
        if missing:
            came = f"; the shards {[*self.parts]} came" if self.parts else ""
            raise LillamaError(
                f"the weights of {missing} of {self.needed} outputs did not come{came}", where=self.name, hint=AGAIN
            )

    def build(self) -> nn.Module:
        """What multiplies by the matrices that came, padded with rows of zeros to all of the layer's outputs."""
        self.check()
        parts = [*self.parts.values()]
        self.parts.clear()
        parts = [padded(parts[0])] if self.needed < self.outputs else parts
        return self.make(parts, self.dtype, self.device, self.name)

    def remove_placeholders(self) -> None:
        """Take the empty parameters away, but for `weight`, which engines ask for its type and device."""
        for suffix in SUFFIXES:
            if suffix != "weight":
                delattr(self.layer, suffix)

    def _where(self, shard: Any) -> str:
        return self.name if shard is None else f"{self.name} (shard {shard})"


class _Probe(nn.Parameter):
    """Stands for a weight: which of its rows or columns the engine's loader puts where."""

    output_dim: int
    input_dim: int
