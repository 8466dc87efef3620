"""The selective scan in plain torch, equal to transformers' own bit by bit, with a backward linear in length.

transformers takes step t of the discretised system as `x[:, :, t]`. The gradient of each such slice is a tensor
of zeros as long as the whole sequence, so the backward costs length^2; that of `x.unbind(2)` is one stack.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCAN = "mamba_selective_scan"
# What a mixer's forward calls by name; each is a CUDA kernel where its package is installed.
KERNELS = (SCAN, "mamba_inner_fn", "mamba_selective_state_update", "causal_conv1d_fn", "causal_conv1d_update")


def linear_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, times silu(z) (Mamba, arXiv 2312.00752, eq. 2).

    `hidden_states` (u), `dt` and `z` are [batch, channels, length], A [channels, state], B and C [batch, state,
    length], D and `delta_bias` [channels]. Returns y like u, with `return_last_state` also h [batch, channels, state].
    """
    dtype = hidden_states.dtype
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    drive = dt[:, :, :, None] * B[:, None, :, :].float() * hidden_states[:, :, :, None].float()
    state = torch.zeros(*hidden_states.shape[:2], A.shape[-1], dtype=dtype, device=hidden_states.device)
    outputs = []
    for decay_t, drive_t, C_t in zip(decay.unbind(2), drive.unbind(2), C[..., None].unbind(1)):
        state = decay_t * state + drive_t
        outputs.append(torch.matmul(state.to(dtype), C_t)[:, :, 0])
    output = torch.stack(outputs, -1)
    if D is not None:
        output = output + hidden_states * D[None, :, None]
    if z is not None:
        output = output * F.silu(z)
    return (output, state) if return_last_state else output


def use_linear_scan(model: nn.Module) -> int:
    """Let every Mamba mixer of `model` run `linear_scan` where transformers would run its own; how many changed.

    Only these instances change, and copies of them; parameters and state keys stay as they are. On a GPU with
    mamba-ssm the kernels go on being used; CPU tensors never reach a kernel, which could not read them. Left alone
    are mixers that run mambapy's parallel scan, that have a forward of their own (accelerate's hooks), or that another
    transformers version builds differently: slower perhaps, as correct.
    """
    changed = 0
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        parallel = getattr(module, "use_mambapy", False) and find_spec("mambapy")
        if parallel or "forward" in vars(module) or not _runs_scan(forward):
            continue
        # A bound method in the instance's own dictionary: copy.deepcopy binds it to the copy.
        module.forward = types.MethodType(_with_linear_scan(forward), module)
        changed += 1
    return changed


def path_in_use() -> str:
    """One sentence for `lillama doctor`: which scan Mamba blocks run here, and why."""
    from transformers.models.mamba import modeling_mamba

    reasons = [trouble for name in ("mamba_ssm", "causal_conv1d") if (trouble := _trouble(name))]
    if not torch.cuda.is_available():
        reasons.append("no CUDA device")
    elif not reasons and not _is_kernel(getattr(modeling_mamba, SCAN, None)):
        reasons.append("transformers does not take the installed kernels")
    if not reasons:
        return "scan: mamba-ssm's CUDA kernels"
    because = "; ".join(reasons)
    if not _runs_scan(inspect.unwrap(modeling_mamba.MambaMixer.forward)):
        return f"scan: transformers' own, whose backward may be quadratic in length: its code is new to us ({because})"
    return f"scan: plain torch, backward linear in length ({because})"


def _runs_scan(forward: Any) -> bool:
    return SCAN in getattr(getattr(forward, "__code__", None), "co_names", ())


def _trouble(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"{package} is not installed"
        return f"{package} cannot be imported: {error}"
    except Exception as error:
        # Built for another torch or CUDA, as happens with these packages: any error at all may come out of it.
        return f"{package} cannot be imported: {type(error).__name__}: {error}"
    return None


def _with_linear_scan(forward: Any) -> Callable[..., Any]:
    """The same code as `forward` that finds other functions under the names of the kernels."""
    found = dict(forward.__globals__)
    for name in KERNELS:
        if name in found:
            found[name] = _dispatch(found[name], linear_scan if name == SCAN else inspect.unwrap(found[name]))
    function = types.FunctionType(forward.__code__, found, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def _dispatch(stock: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`stock` for tensors on an accelerator where it is a kernel of its package, `plain` everywhere else."""
    if not _is_kernel(stock):
        return plain

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (plain if x.device.type == "cpu" else stock)(x, *args, **kwargs)

    return call


def _is_kernel(function: Any) -> bool:
    """Whether transformers put a package's function under this name (its wrapper keeps both)."""
    try:
        held = inspect.getclosurevars(function).nonlocals
    except TypeError:
        return True  # replaced by something of the `kernels` package
    return bool(held.get("is_new_implementation", True))
