"""What experts compute between their projections, however they keep these: torch alone, as in arithmetic.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class Between:
    """How experts are called, and what happens between their projections."""

    gated: bool
    transposed: bool = False  # E x d_in x d_out
    in_turn: bool = False  # gate and up are the even and the odd rows; otherwise the halves
    biased: bool = False
    normed: bool = False  # every expert's output goes through `post_expert_norm`
    sorted: bool = False  # called with equally many rows for each expert, in their order, and nothing else
    arguments: tuple[str, ...] = ("hidden_states", "top_k_index", "top_k_weights")

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the projections, in the order they run."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    @property
    def entries(self) -> tuple[str, ...]:
        """The projections that see the module's input."""
        return self.projections[:-1]

    @property
    def first(self) -> str:
        """The parameter that holds the entries."""
        return "gate_up_proj" if self.gated else "up_proj"

    def joined(self, given: Mapping[str, Tensor], dim: int) -> Tensor:
        """The entries in one, along `dim`."""
        parts = [given[name] for name in self.entries]
        if self.in_turn:
            return torch.stack(parts, dim + 1).flatten(dim, dim + 1)
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def activated(self, module: Any, entries: Mapping[str, Tensor], side_by_side: bool = False) -> Tensor:
        """What `down` gets of the entries' outputs (rows x I), by the module's own gate and activation.

        `side_by_side`: hand them on as the fused product leaves them; an activation of a contiguous half may round
        otherwise.
        """
        if not self.gated:
            activated: Tensor = module.act_fn(entries["up"])
            return activated
        own = getattr(type(module), "_apply_gate", None)
        if own is None or getattr(own, "__name__", "") == "_default_apply_gate":
            gate, up = entries["gate"], entries["up"]
            if side_by_side:
                gate, up = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
            gated: Tensor = module.act_fn(gate) * up
            return gated
        by_its_own: Tensor = module._apply_gate(self.joined(entries, entries["up"].dim() - 1))
        return by_its_own

    def finished(self, module: Any, rows: Tensor) -> Tensor:
        """What leaves an expert, of what leaves its `down`."""
        if not self.normed:
            return rows
        normed: Tensor = module.post_expert_norm(rows)
        return normed

    def given(self, experts: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (T x H), chosen experts (T x K) and their weights (T x K) of a call of the module.

        A choice that is no number of an expert is nobody's.
        """
        found = {**dict(zip(self.arguments, args)), **kwargs}
        hidden = found[self.arguments[0]]
        if not self.sorted:
            return hidden, found[self.arguments[1]], found[self.arguments[2]]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        index = torch.arange(experts, device=hidden.device).repeat_interleave(len(hidden) // experts)
        if not self.biased:  # rows of zeros stand for tokens that did not choose the expert
            index = index.masked_fill((hidden == 0).all(-1), experts)
        return hidden, index[:, None], hidden.new_ones(len(hidden), 1)
