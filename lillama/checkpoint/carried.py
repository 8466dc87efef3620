"""The modules of a standalone checkpoint: what its own modelling file adds to transformers, without lillama.

`standalone.py` writes that file: the text of this one and of what it imports from lillama, and a class at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lillama.lowrank.arithmetic import (
    ONE_MATRIX,
    Orders,
    Products,
    lay_out,
    look_up_factors,
    look_up_pivoted,
    multiply_factors,
    multiply_pivoted,
    pivoted_orders,
    product_pivoted,
)

LEAVES = {"factors": ("A", "B"), "pivoted": ("B", "C")}
How = Mapping[str, Any]  # what config.json says of a module: kind, storage, rank, shape, tied


class LowRankModule(nn.Module):
    """What stands where a dense module was: tensors of matrices of low rank, by a prefix each."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[str, str] = {}
        self.orders: dict[str, tuple[Tensor, Orders]] = {}

    def add_matrix(self, prefix: str, how: How, options: dict[str, Any]) -> None:
        """Give the module the unfilled tensors of a matrix, or of a stack of them; `options`: device and dtype."""
        *copies, d_out, d_in = how["shape"]
        rank = how["rank"]
        self.storages[prefix] = how["storage"]
        sizes = {"A": (d_out, rank), "B": (rank, d_in)}
        if how["storage"] == "pivoted":
            sizes = {"B": (rank, d_in), "C": (d_out - rank, rank)}
            pivots = torch.arange(rank, device=options["device"])
            self.register_buffer(f"{prefix}pivots", pivots.repeat(*copies, 1) if copies else pivots)
        for suffix, size in sizes.items():
            self.register_parameter(prefix + suffix, nn.Parameter(torch.empty(*copies, *size, **options)))

    def orders_of(self, prefix: str) -> Orders:
        """The order of the rows of a pivoted matrix, kept until its pivots are others."""
        pivots: Tensor = getattr(self, f"{prefix}pivots")
        known = self.orders.get(prefix)
        if known is None or known[0] is not pivots:
            others = getattr(self, f"{prefix}C").shape[-2]
            if pivots.dim() == 1:
                found = pivoted_orders(pivots, others)
            else:
                each = [pivoted_orders(one, others) for one in pivots]
                found = torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each])
            self.orders[prefix] = known = pivots, found
        return known[1]

    def two(self, prefix: str) -> tuple[Tensor, Tensor]:
        """The two tensors of a matrix: A and B, or B and C."""
        first, second = LEAVES[self.storages[prefix]]
        return getattr(self, prefix + first), getattr(self, prefix + second)

    def multiplied(self, prefix: str, x: Tensor, products: Products = ONE_MATRIX, bias: Tensor | None = None) -> Tensor:
        """A matrix times x."""
        one, other = self.two(prefix)
        if self.storages[prefix] == "factors":
            return multiply_factors(x, one, other, products, bias)
        return multiply_pivoted(x, one, other, self.orders_of(prefix), products, bias)

    @property
    def weight(self) -> Tensor:
        """The matrix itself, which some architectures read."""
        one, other = self.two("")
        return one @ other if self.storages[""] == "factors" else product_pivoted(one, other, self.orders_of(""))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.orders.clear()


class LowRankLinear(LowRankModule):
    """y = W x + b with W of low rank."""

    bias: nn.Parameter | None

    def __init__(self, dense: Any, how: How) -> None:
        super().__init__()
        self.out_features, self.in_features = how["shape"]
        self.add_matrix("", how, {"device": dense.weight.device, "dtype": dense.weight.dtype})
        self.register_parameter("bias", dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplied("", x, bias=self.bias)


class LowRankEmbedding(LowRankModule):
    """A table of token vectors of low rank."""

    def __init__(self, dense: Any, how: How) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = how["shape"]
        self.padding_idx = dense.padding_idx
        self.add_matrix("", how, {"device": dense.weight.device, "dtype": dense.weight.dtype})

    def forward(self, ids: Tensor) -> Tensor:
        one, other = self.two("")
        if self.storages[""] == "factors":
            return look_up_factors(ids, one, other, self.padding_idx)
        return look_up_pivoted(ids, one, other, self.orders_of(""))


KINDS: dict[str, type[LowRankModule]] = {"linear": LowRankLinear, "embedding": LowRankEmbedding}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class LowRankModel:
    """Stands before a class of transformers: the modules of it that `config.low_rank` names are of low rank."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # that of the class behind it
        model: Any = self
        said = config.low_rank
        same: dict[str, str] = {}  # names of parameters -> the name that the file holds them under
        for first, *others in said.get("shared", ()):
            for name in others:
                put(model, name, model.get_submodule(first))
        for name, (d_out, d_in) in said.get("shapes", {}).items():
            old = model.get_submodule(name)
            options = {"device": old.weight.device, "dtype": old.weight.dtype}
            put(model, name, nn.Linear(d_in, d_out, old.bias is not None, **options))
        for name, how in said["modules"].items():
            put(model, name, KINDS[how["kind"]](model.get_submodule(name), how))  # type: ignore[call-arg]
        for name, how in said["modules"].items():
            if how.get("tied"):
                for leaf in LEAVES[how["storage"]]:
                    setattr(model.get_submodule(name), leaf, getattr(model.get_submodule(how["tied"]), leaf))
                    same[f"{name}.{leaf}"] = f"{how['tied']}.{leaf}"
        for first, *others in said.get("shared", ()):
            names = [name for name, _ in model.get_submodule(first).named_parameters()]
            same |= {f"{other}.{name}": f"{first}.{name}" for other in others for name in names}
        gone = {f"{name}.weight" for name in said["modules"]}
        for known in ("_tied_weights_keys", "all_tied_weights_keys"):
            kept = {k: v for k, v in (getattr(model, known, None) or {}).items() if k not in gone}
            setattr(model, known, kept | same)
        # Empty tensors under the names of dense weights: without this file no class of transformers loads them.
        ignored = {rf"(^|\.){re.escape(name)}$" for name in said["ignored"]}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As always."""
        found = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]  # that of the class behind it
        ours = [m for m in (found[0] if isinstance(found, tuple) else found).modules() if isinstance(m, LowRankModule)]
        linears = [module for module in ours if isinstance(module, LowRankLinear)]
        lay_out(linears, [module for module in ours if not isinstance(module, LowRankLinear)])
        return found

    @classmethod
    def _behind(cls) -> Any:
        return cls.__mro__[cls.__mro__.index(LowRankModel) + 1]

    # transformers reads the text of a class's own file to know these.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls._behind()._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._behind()._can_set_experts_implementation())

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """As always, with the empty tensors."""
        model: Any = self
        state = dict(model.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"])
        state |= {name: torch.empty(size) for name, size in model.config.low_rank["markers"].items()}
        kwargs["state_dict"] = state
        return super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # that of the class behind it
