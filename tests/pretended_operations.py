"""What stands for a tensor on a pretended card (pretended.py), and how operations on it are looked at."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from pretended import Pretended

aten = torch.ops.aten
CPU = torch.device("cpu")
PROJECT = str(Path(__file__).parent.parent)
CARDS = ("cuda", "mps")

READS = {aten._local_scalar_dense.default, aten.equal.default}
# What makes tensors whose size depends on numbers: a card is waited for to learn it.
SIZED_BY_NUMBERS = ("nonzero", "masked_select", "unique", "_unique2", "unique_dim", "repeat_interleave", "bincount")
# Decompositions say whether they worked, which is looked at at once, on the host.
CHECKED = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq")
ACROSS = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
HEAVY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "linalg_", "_linalg_", "geqrf")


class Placed(torch.Tensor):
    """A tensor on a card that is not there; `held` has its numbers."""

    held: torch.Tensor
    label: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, label: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held, made.label = held, label
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor of a pretended card, outside the pretence")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.label

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.label.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placed({tuple(self.shape)}, {self.dtype}, {self.label})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def record_stream(self, queue: Any) -> None:
        queue.pretended.order.append(f"kept for {queue.name}")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.label} device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        pretence().wait("tolist")
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self))
        if copied is None:
            copied = Placed(self.held.clone(), self.label).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return copied


def bare(value: Any) -> Any:
    """The numbers of a tensor, wherever it is."""
    return value.held if isinstance(value, Placed) else value


_here = threading.local()


def pretence() -> Pretended:
    """The pretence that goes on."""
    return _here.pretence


def begin(pretended: Pretended) -> None:
    """From here on `pretended` goes on."""
    _here.pretence = pretended


def place_of(depth: int = 2) -> str:
    """The innermost line of the project that led here, as `file:line function`."""
    frame = sys._getframe(depth)
    while frame is not None:
        name = frame.f_code.co_filename
        ours = name.startswith(PROJECT) and "site-packages" not in name  # an environment may lie in the project
        if ours and not Path(name).name.startswith("pretended"):
            return f"{Path(name).relative_to(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Operations(TorchDispatchMode):
    """Looks at every operation, those of the way back too."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pretended = self.pretended
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        placed = [t for t in tensors if isinstance(t, Placed)]
        name = func.overloadpacket.__name__
        if not placed:
            if name.startswith(HEAVY) and any(t.is_floating_point() and not t.is_meta for t in tensors):
                pretended.by_hand[f"{place_of()}: {name}"] += 1
            found = func(*args, **kwargs)
            if pretended.born is not None and not tensors and kwargs.get("device") in (None, CPU):
                return pytree.tree_map(lambda t: pretended.place(t, pretended.born), found)
            return found
        label = self._common(func, tensors, placed)
        if func is aten._to_copy.default and kwargs.get("device") is not None:  # as C++ sees it
            label = pretended.resolve(kwargs["device"]) or label
        self._look(func, name, args, kwargs, placed)
        plain = pytree.tree_map(bare, kwargs)
        given = pytree.tree_map(bare, args)
        if (
            func is aten.histc.default and not given[0].is_floating_point()
        ):  # which a card counts, and the host does not
            found = func(given[0].float(), *given[1:], **plain).to(given[0].dtype)
        else:
            found = func(*given, **plain)
        return self._returned(func, args, kwargs, found, label)

    def _common(self, func: Any, tensors: list[Any], placed: list[Any]) -> torch.device:
        """The device of an operation, which is that of all its tensors."""
        if func in ACROSS:
            return tensors[0].device
        few = [t for t in tensors if t.dim() or isinstance(t, Placed)]  # a single number of the host goes anywhere
        if func in INDEXED:
            few = [t for t in few if isinstance(t, Placed) or t.dtype not in (torch.int64, torch.bool)]
        where = {str(t.device) for t in few}
        if len(where) > 1:
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {' and '.join(sorted(where))} "
                f"in {func} ({shapes}) at {place_of(3)}"
            )
        return placed[0].label

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, placed: list[Any]) -> None:
        pretended = self.pretended
        if any(t.label.type == "mps" and t.dtype == torch.float64 for t in placed):
            raise TypeError(f"the MPS framework doesn't support float64 ({place_of(3)})")
        by_mask = func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if func in READS or by_mask or name in SIZED_BY_NUMBERS or name.startswith(CHECKED):
            pretended.wait(name)
        if func is aten.copy_.default and args[0].device != args[1].device:
            # From a card into memory that may be moved: the host waits, whatever was asked for.
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not free or (args[0].device == CPU and args[0].data_ptr() not in pretended.pinned):
                pretended.wait(f"{args[1].device} to {args[0].device}")

    def _returned(self, func: Any, args: Any, kwargs: Any, found: Any, label: torch.device) -> Any:
        """What an operation returns, on its device; a tensor that it wrote into is that tensor itself."""
        written = [
            value
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[argument.name]
            for argument in func._schema.arguments
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write
        ]
        same = {id(t.held if isinstance(t, Placed) else t): t for t in pytree.tree_leaves(written) if t is not None}

        def back(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return same[id(value)] if id(value) in same else self.pretended.place(value, label)

        return pytree.tree_map(back, found)
