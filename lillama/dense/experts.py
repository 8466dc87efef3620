"""How a module of fused experts keeps its weights and what it computes of them: one `Layout` says it for all layouts.

Served are modules that hold `gate_up_proj` (or, without a gate, `up_proj`) and `down_proj` of three dimensions, the
expert first, whatever else differs: transposed or not, gate and up in halves or in turn, with biases, with a gate
function of their own (`_apply_gate`), with a norm behind every expert, called with the router's choices (hidden states
T x H, index T x K, weights T x K) or with rows sorted by expert. What a module says of itself (the flags that
transformers' `use_experts_implementation` leaves) is tried first. Nothing is believed: a small copy runs both the
module's own forward and the layout's, and a module that computes anything else is refused with a reason.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.dense.between import PROJECTIONS as PROJECTIONS
from lillama.dense.between import Between
from lillama.dense.probe import apart, filled, once, own_forward, same, twin
from lillama.errors import LillamaError

FUSED = ("gate_up_proj", "up_proj", "down_proj")
PROBED = 3  # experts of the copy that is tried


@dataclass(frozen=True)
class Layout(Between):
    """Where the projections of a module of fused experts are, and what happens between them."""

    def weight(self, module: Any, projection: str) -> Tensor:
        """One projection of dense experts, E x d_out x d_in (a view). Raises LillamaError for one that is not there."""
        fused = self._parameter(module, projection)
        return self._part(fused.transpose(1, 2) if self.transposed else fused, projection)

    def bias(self, module: Any, projection: str) -> Tensor | None:
        """The bias of a projection, E x d_out (a view)."""
        return self._part(self._parameter(module, projection, "_bias"), projection) if self.biased else None

    def _parameter(self, module: Any, projection: str, suffix: str = "") -> Tensor:
        if projection not in self.projections:
            raise LillamaError(f"{type(module).__name__} has no projection '{projection}'")
        fused: Tensor = getattr(module, (self.first if projection in self.entries else "down_proj") + suffix)
        return fused.detach()

    def _part(self, fused: Tensor, projection: str) -> Tensor:
        if not self.gated or projection == "down":
            return fused
        half = projection == "up"
        return fused[:, half::2] if self.in_turn else fused.chunk(2, dim=1)[half]

    def fused(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The module's parameters, by name, that hold these projections (E x d_out x d_in) and biases (E x d_out)."""
        for suffix, given in (("", weights), ("_bias", biases)):
            if given:
                both = (self.joined(given, 1), given["down"])
                for name, tensor in zip((self.first, "down_proj"), both):
                    turned = self.transposed and not suffix
                    yield name + suffix, tensor.transpose(1, 2).contiguous() if turned else tensor

    def of_one(self, module: Any, expert: int, x: Tensor) -> Tensor:
        """What expert `expert` of a dense module makes of rows x."""

        def linear(name: str, rows: Tensor) -> Tensor:
            bias = self.bias(module, name)
            return F.linear(rows, self.weight(module, name)[expert], None if bias is None else bias[expert])

        inner = self.activated(module, {name: linear(name, x) for name in self.entries})
        return self.finished(module, linear("down", inner))


def experts_layout(module: nn.Module) -> Layout | None:
    """The layout of a module of fused experts; None for any other, and for one that cannot be served."""
    found = _inspected(module)
    return found if isinstance(found, Layout) else None


def why_not(module: nn.Module) -> str | None:
    """Why a module of fused experts cannot be served; None for one that can, and for what holds no experts."""
    found = _inspected(module)
    return found if isinstance(found, str) else None


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module of fused experts. Raises LillamaError where it is none that is served."""
    found = _inspected(module)
    if isinstance(found, Layout):
        return found
    name = type(module).__name__
    raise LillamaError(f"{name} holds no experts of a layout that is known here" + (f": {found}" if found else ""))


def replaced_parameters(module: nn.Module, projections: Iterable[str]) -> list[str]:
    """The fused parameters of which nothing is left when `projections` become factors."""
    layout, chosen = layout_of(module), set(projections)
    parts = ((layout.first, set(layout.entries)), ("down_proj", {"down"}))
    return [name for name, of in parts if of <= chosen]


def _inspected(module: nn.Module) -> Layout | str | None:
    """Its layout, why it has none that is served, or None where it holds no experts."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    stacks = [name for name, shape in own.items() if len(shape) == 3]
    if not stacks or isinstance(module, nn.modules.conv._ConvNd):
        return None
    if not {"down_proj"} < own.keys() or not any(name in own for name in FUSED[:2]):
        return f"it keeps its weights as {', '.join(stacks)}" if len(stacks) > 1 else None
    found: Layout | str = once("experts", module, lambda: _tried(module, own))
    return found


def _tried(module: nn.Module, own: Mapping[str, tuple[int, ...]]) -> Layout | str:
    """The first layout that computes what the module computes; otherwise the reason."""
    gated = "gate_up_proj" in own
    first, down = own["gate_up_proj" if gated else "up_proj"], own["down_proj"]
    biased = f"{'gate_up_proj' if gated else 'up_proj'}_bias" in own
    known = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    known |= {f"{name}_bias" for name in known} if biased else set()
    if own.keys() != known:
        return f"it holds {', '.join(sorted(own.keys() ^ known))} besides what is known"
    if len(first) != 3 or len(down) != 3 or first[0] != down[0]:
        return f"its projections hold {first[0]} and {down[0]} experts"
    if next(module.buffers(recurse=False), None) is not None:
        return "it holds buffers"
    asked = list(inspect.signature(own_forward(module)).parameters.values())[1:]
    if len(asked) not in (1, 3) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in asked):
        return f"its forward takes {', '.join(p.name for p in asked)}"
    how: dict[str, Any] = {
        "normed": bool(getattr(module, "has_post_expert_norm", False)),
        "sorted": len(asked) == 1,
        "arguments": tuple(p.name for p in asked),
    }
    wide = 2 if gated else 1
    both = [(first[1], first[2]) == (wide * down[2], down[1]), (first[2], first[1]) == (wide * down[1], down[2])]
    said = bool(getattr(module, "is_transposed", False)), not getattr(module, "is_concatenated", True)
    # What the module says of itself comes first.
    turns = [t for t in (said[0], not said[0]) if both[t]]
    for transposed, in_turn in itertools.product(turns, (said[1], not said[1]) if gated else (False,)):
        layout = Layout(gated, transposed, in_turn, biased, **how)
        if _computes_the_same(module, layout):
            return layout
    return "it computes something else of its weights than experts that are known do"


def _computes_the_same(module: nn.Module, layout: Layout) -> bool:
    """Whether a copy with few experts puts out what the layout says."""
    own = dict(module.named_parameters(recurse=False))
    experts = min(PROBED, len(own["down_proj"]))
    shapes = {name: (experts, *p.shape[1:]) for name, p in own.items()}
    generator = torch.Generator().manual_seed(0)
    with apart():
        try:
            copy = twin(module, {name: filled(shape, number) for number, (name, shape) in enumerate(shapes.items())})
            width = layout.weight(copy, "up").shape[2]
            x = torch.randn(4 * experts, width, generator=generator)
            index = torch.arange(4 * experts)[:, None] % experts
            weights = torch.rand(len(x), 1, generator=generator) + 0.5
            given = (x,) if layout.sorted else (x, index, weights)
            found = own_forward(module)(copy, *given)
            x, index, weights = layout.given(experts, given, {})
            mine = torch.zeros_like(x)
            for expert in range(experts):
                rows = index[:, 0] == expert
                mine[rows] = (layout.of_one(copy, expert, x[rows]) * weights[rows]).to(mine.dtype)
        except Exception:  # whatever another one's code raises: this is not how it wants to be called
            return False
    return same(found, mine)
