"""What multiplies by one matrix: in full, or in few bits, by the kernel that there is for them on a device.

| device | type | 8 bits | 4 bits |
|---|---|---|---|
| CPU | bfloat16 | torch's product with 4-bit numbers, twice as many (packed.py) | the same (packed.py) |
| CPU | others | kept in 8 bits, made whole for every call, some rows at a time | the same |
| GPU | 16 bits | what vLLM chooses: Machete, Marlin, .. | the same |

Where there is none the matrix is made whole when it is loaded, and a line of the log says which and why.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from lillama.lowrank.coded import spread, unpack
from lillama.serving.packed import AT_ONCE, Packed, layout
from lillama.serving.pieces import Matrix, Piece

TYPES = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}  # by bits: numbers from 0, less a half of all

log = logging.getLogger(__name__)


def multiplier(matrix: Matrix, dtype: torch.dtype, device: torch.device, name: str) -> nn.Module:
    """x -> x W^T for a matrix of the layer `name`."""
    if isinstance(matrix, Tensor):
        return Product(matrix.to(device, dtype))
    if current_platform.is_cpu():
        return on_cpu(matrix, dtype)
    try:
        return Chosen(matrix, dtype, device)
    except ValueError as error:
        say_whole(name, matrix, str(error))
        return Product(matrix.whole(dtype).to(device))


def on_cpu(piece: Piece, dtype: torch.dtype) -> Packed | Made:
    """What multiplies by a matrix in few bits on a CPU, and looks rows up in it."""
    return Packed(piece) if dtype == torch.bfloat16 and layout() is not None else Made(piece, dtype)


def say_whole(name: str, piece: Piece, why: str) -> None:
    """Tell the log that a matrix in few bits is kept in full."""
    n, k = piece.shape
    reason = "; ".join(line.strip() for line in why.splitlines() if line.strip())
    log.warning("%s: %d x %d numbers of %d bits were made whole when loaded: %s", name, n, k, piece.bits, reason)


class Product(nn.Module):
    """x -> x W^T, by the product that the engine has for dense weights (packed beforehand on a CPU)."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))
        # Not `quant_method`: the engine processes every module that has one, and this is done here.
        self.by = UnquantizedLinearMethod()
        self.by.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.by.apply(self, x)


class Made(nn.Module):
    """x -> x W^T, and rows of W, for a piece that stays as it is: its numbers are made where they are needed."""

    def __init__(self, piece: Piece, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.bits, self.group, self.left, self.columns = piece.like
        self.codes = nn.Parameter(piece.codes.to(device).contiguous(), requires_grad=False)
        self.scale = nn.Parameter(piece.scale.to(device, dtype).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        how = (self.bits, self.group, self.left)
        y: Tensor = torch.ops.vllm.lillama_made(x.flatten(0, -2), self.codes, self.scale, *how)
        return y.unflatten(0, x.shape[:-1])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of W."""
        vectors = _whole(self.codes[ids], self.scale[ids], self.bits, self.group)
        return vectors[..., self.left : self.left + self.columns]


def _whole(codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    numbers = unpack(codes, bits).to(scale.dtype)
    if numbers.shape[-1] == scale.shape[-1] * group:
        return (numbers.unflatten(-1, (-1, group)) * scale[..., None]).flatten(-2)
    return numbers * spread(scale, group, numbers.shape[-1])


def _made(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, left: int) -> Tensor:
    step = max(1, AT_ONCE // (scale.shape[1] * group))
    results = []
    for start in range(0, len(codes), step):
        W = _whole(codes[start : start + step], scale[start : start + step], bits, group)
        results.append(F.linear(x, W[:, left : left + x.shape[1]]))
    return results[0] if len(results) == 1 else torch.cat(results, -1)


def _shape(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, left: int) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


direct_register_custom_op("lillama_made", _made, fake_impl=_shape)


class Chosen(nn.Module):
    """x -> x W^T by the kernel that vLLM chooses for such numbers; ValueError where it has none."""

    def __init__(self, piece: Piece, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"its kernels for few bits compute in 16 bits, not in {dtype}")
        self.around = (piece.left, piece.width - piece.left - piece.columns)
        shape, kind = (piece.width, len(piece)), TYPES[piece.bits]
        config = MPLinearLayerConfig(shape, shape, kind, dtype, piece.group, zero_points=False)
        chosen: Any = choose_mp_linear_kernel(config)
        numbers = piece.numbers().to(device, torch.int32) + 2 ** (piece.bits - 1)
        self.weight_packed = PackedvLLMParameter(
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=32 // piece.bits,
            weight_loader=_no_loader,
            data=pack_quantized_values_into_int32(numbers, kind, packed_dim=1),
        )
        scale = piece.scale.to(device, dtype)
        self.weight_scale = GroupQuantScaleParameter(input_dim=1, output_dim=0, weight_loader=_no_loader, data=scale)
        self.bias = None  # which kernels ask for
        self.kernel = chosen(config, "weight_packed", "weight_scale", "weight_zero_point")
        self.kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.around) if any(self.around) else x.contiguous()
        y: Tensor = self.kernel.apply_weights(self, x)
        return y


def _no_loader(*_: Any, **__: Any) -> None:
    """The numbers are there already; the engine's parameters want a loader nevertheless."""
