"""How far a head is from the original's, a few positions at a time: logits of a whole batch are too wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from lillama.distill.losses import token_mean
from lillama.pretrained import predictions
from lillama.pretrained.calls import Call
from lillama.pretrained.walk import HeadTarget

Objective = Callable[[Tensor, Tensor], Tensor]


def head_distances(
    module: nn.Module, inputs: Mapping[str, Tensor], target: HeadTarget, objective: Objective
) -> dict[str, Tensor]:
    """The mean distance over tokens for each of the streams that enter, by its name; equal ones are run once."""
    found: dict[str, Tensor] = {}
    for name, hidden in inputs.items():
        same = next((other for other in found if inputs[other] is hidden), None)
        found[name] = head_distance(module, hidden, target, objective) if same is None else found[same]
    return found


def head_distance(module: nn.Module, hidden: Tensor, target: HeadTarget, objective: Objective) -> Tensor:
    """The mean distance over the tokens of a batch between what `module` makes of `hidden` [B, T, D] and the target.

    Teacher and student make logits of the same positions, and the student's run back at once.
    """
    call, device = target.call, target.walk.device
    mask = call.loss_mask
    parts = _parts(module, call, hidden)

    def distance(part: range, entering: Tensor) -> Tensor:
        with device.autocast():
            made = call(module, entering[:, part.start : part.stop])
        return objective(made.float(), target.of(part).float())

    if len(parts) == 1:
        return token_mean(distance(parts[0], hidden), mask)
    here = None if mask is None else mask.to(hidden.device).float()
    count = hidden.shape[:2].numel() if here is None else here.sum().clamp_min(1)

    def losses(entering: Tensor) -> Iterator[Tensor]:
        for part in parts:
            found = distance(part, entering)
            yield (found if here is None else found * here[:, part.start : part.stop]).sum() / count

    return predictions.summed(losses, hidden, [p for p in module.parameters() if p.requires_grad])


def _parts(module: nn.Module, call: Call, hidden: Tensor) -> list[range]:
    """The positions whose logits are made at once: all, where the head is given more than hidden states."""
    whole = range(hidden.shape[1])
    alone = not any(isinstance(leaf, Tensor) for leaf in call.leaves) and len(call.shapes) <= 1
    counted = call.loss_mask is None or call.loss_mask.shape == hidden.shape[:2]
    vocabulary = getattr(module, "out_features", None)
    if hidden.dim() != 3 or not (alone and counted and vocabulary):
        return [whole]
    return predictions.parts_of(whole, max(predictions.READ // (len(hidden) * vocabulary), 1))
