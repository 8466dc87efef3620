"""What a plugin tells the host about a model: its layers and the weights that may be factorised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

WeightKind = Literal["linear", "embedding", "experts"]
LayerKind = Literal["block", "embedding", "head"]


@dataclass(frozen=True)
class Weight:
    """One matrix of a layer that may be factorised.

    `name` is the dotted name of its module in the whole model; `shape` is (d_out, d_in); `copies` is how
    many such matrices are stacked (experts); weights of one `group` see the same input and share one
    Gram matrix.
    """

    name: str
    shape: tuple[int, int]
    copies: int = 1
    kind: WeightKind = "linear"
    group: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the dense weight holds, bias not counted."""
        return self.shape[0] * self.shape[1] * self.copies


@dataclass(frozen=True)
class Layer:
    """The unit of distillation: one module whose output the student must reproduce.

    Layers are listed in the order the stream runs through them, the ones that are only passed
    through (`weights=()`) included. A `block` maps hidden states to hidden states, an `embedding` token
    ids to hidden states, a `head` hidden states to logits.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    kind: LayerKind = "block"

    @classmethod
    def of_linears(cls, model: nn.Module, name: str, groups: Sequence[Sequence[str]]) -> Layer:
        """The block `name` of `model`, its `nn.Linear`s grouped by common input.

        `groups` lists module names relative to the block, e.g. (("attn.q", "attn.k"), ("attn.o",)); names
        the block lacks are passed over, so one table can serve relatives of a family.
        """
        from torch import nn

        block = model.get_submodule(name)
        modules = dict(block.named_modules())
        weights = []
        for group in groups:
            for relative in group:
                linear = modules.get(relative)
                if isinstance(linear, nn.Linear):
                    shape = (linear.out_features, linear.in_features)
                    weights.append(Weight(f"{name}.{relative}", shape, group=f"{name}.{group[0]}"))
        return cls(name, tuple(weights))
