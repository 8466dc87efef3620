"""Fine-tuning where one card does not hold the model: every process keeps a part of each block's numbers (FSDP, torch).

A block's numbers are brought together while it runs, forwards and back, and let go again; its gradients are added up on
the way, and each process's optimiser has those of its own part. What stands outside the blocks (embedding, last norm,
head) is whole in every process, since the loss asks the head for a few positions at a time. All processes must run the
blocks equally often, whatever rows each has: together.py sees to that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lillama.base import ranks


def divide(model: Any, blocks: Sequence[str], device: torch.device) -> Any:
    """A copy of `model` (on the host) on `device`, of whose `blocks`, by name, each process has a part.

    peft's model is divided as the one in it. The copy learns by itself: `gather` brings what it learned back.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # What is tied in the model is tied in the copy: a parameter is copied once, and as a form without numbers.
    forms = {id(p): _form_of(p) for p in model.parameters()}
    paths = {id(module): name for name, module in model.named_modules()}
    divided = copy.deepcopy(model, cast(dict[int, Any], forms))
    mesh = init_device_mesh(device.type, (ranks.world(),))
    for name in blocks:
        # Left to itself a block that no divided module is around would stay whole between its runs.
        block = divided.get_submodule(paths[id(inner.get_submodule(name))])
        block = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # the loss of a row is divided by the labels of all already
        block.set_force_sum_reduction_for_comms(True)  # or it is asked of Gloo to multiply, which that cannot
        if hasattr(block, "set_reduce_scatter_unused_params"):  # since torch 2.13: experts that no row here reached
            block.set_reduce_scatter_unused_params(True)
    _fill(divided, model, device)
    return divided


def _form_of(parameter: Tensor) -> nn.Parameter:
    """A parameter like another, without numbers; its rows are next to each other, as FSDP wants them."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, parameter.requires_grad)


def _fill(divided: Any, model: Any, device: torch.device) -> None:
    """Give the forms in `divided` their numbers, a parameter at a time."""
    made: dict[int, nn.Parameter] = {}
    for name, module in divided.named_modules():
        source = model.get_submodule(name)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            whole = getattr(source, leaf)
            if id(whole) not in made:
                made[id(whole)] = nn.Parameter(part_of(whole.data, parameter, device), parameter.requires_grad)
            setattr(module, leaf, made[id(whole)])
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))


def part_of(whole: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """What this process keeps of `whole` where it keeps it of `parameter`: a copy on `device`."""
    if not isinstance(parameter, DTensor):
        return whole.to(device, copy=True)
    # Every process has it whole, so nothing need travel.
    return distribute_tensor(
        whole.to(device).contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Give `parameter` the numbers of `whole`, of which this process may keep a part."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(cast(DTensor, part_of(whole, parameter, parameter.to_local().device)).to_local())
    else:
        parameter.copy_(whole)


def whole_of(tensor: Tensor) -> Tensor:
    """`tensor` whole, on the host; where processes have parts of it all of them must call."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().cpu()


def learned_of(model: Any) -> dict[str, nn.Parameter]:
    """Every parameter of `model` that learns, by its name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather(divided: Any, model: Any) -> None:
    """Give `model` the numbers of the copy that `divide` made of it."""
    own = learned_of(model)
    for name, parameter in learned_of(divided).items():
        own[name].data.copy_(whole_of(parameter))


def whole_learned(divided: Any) -> dict[str, Tensor]:
    """Every parameter that learns, whole; all must call, and the first process alone keeps them."""
    found = {name: whole_of(parameter) for name, parameter in learned_of(divided).items()}
    return found if ranks.is_first() else {}


def whole_state(optimizer: Any) -> dict[str, Any]:
    """The state of an optimiser as one process would have it; all must call, and the first alone keeps it."""
    found: dict[str, Any] = optimizer.state_dict()
    states: dict[Any, dict[str, Any]] = {}
    for number, state in found["state"].items():
        states[number] = {}
        for name, value in state.items():
            whole = whole_of(value) if isinstance(value, Tensor) else value
            states[number][name] = whole if ranks.is_first() else None
    return found | {"state": states}


def divide_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Of what `whole_state` gave, this process's part, before `optimizer` loads it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    for number, held in state["state"].items():
        parameter = parameters[number]
        states[number] = {name: _as_kept(value, parameter) for name, value in held.items()}
    return state | {"state": states}


def _as_kept(value: Any, parameter: Tensor) -> Any:
    """A number of the optimiser's for `parameter` as it is, a tensor of one for each of its numbers as that is kept."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return part_of(value, parameter, parameter.to_local().device)
    return value


def is_divided(tensor: Tensor) -> bool:
    """Whether each process has a part of `tensor`, and its gradient is added up as it comes."""
    return isinstance(tensor, DTensor)
