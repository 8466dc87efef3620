"""Kernels for few bits: what they compute, what they keep in memory, and which is chosen where."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F
from vllm.model_executor.kernels.linear import MarlinLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision import marlin
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from lillama.lowrank.coded import pack, round_nearest
from lillama.serving import kernels, packed
from lillama.serving.packed import ROWS, Packed, layout
from lillama.serving.pieces import Piece

CPU = torch.device("cpu")
FORMS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]


def piece(n: int, k: int, bits: int, group: int, columns: torch.Tensor | None = None) -> Piece:
    codes, scale = round_nearest(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), bits, group)
    found = Piece.of(pack(codes, bits), scale.bfloat16())
    return found if columns is None else found.of_columns(columns)


def inputs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(product, one: Piece, dtype: torch.dtype, rows: int = 3) -> None:
    """The product of a kernel, as far as rounding in its type goes."""
    x = inputs(rows, one.columns, dtype)
    wanted = F.linear(x.float(), one.whole(torch.float32))
    y = product(x)
    assert y.dtype == dtype and y.shape == wanted.shape
    assert (y.float() - wanted).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * wanted.norm()


@pytest.mark.parametrize("bits, group", FORMS)
@pytest.mark.parametrize("n, k, own", [(64, 128, None), (70, 200, None), (100, 256, slice(37, 201))])
def test_torch_s_product_with_4_bits_serves_8_as_well(bits, group, n, k, own, monkeypatch):
    assert layout() is not None
    monkeypatch.setattr(packed, "AT_ONCE", 1)  # a block at a time
    one = piece(n, k, bits, group, None if own is None else torch.arange(k)[own])
    product = kernels.on_cpu(one, torch.bfloat16)
    assert isinstance(product, Packed)
    check(product, one, torch.bfloat16)
    check(product, one, torch.bfloat16, rows=ROWS[bits])  # so many that the matrix itself is cheaper
    ids = torch.tensor([[0, n - 1], [33, 5]])
    assert torch.equal(product.rows(ids), one.whole(torch.bfloat16)[ids])


@pytest.mark.parametrize("bits, group", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_made_for_every_call_is_the_matrix(bits, group, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "AT_ONCE", 1000)  # some rows at a time
    for one in (piece(70, 200, bits, group), piece(70, 200, bits, group, torch.arange(37, 150))):
        product = kernels.on_cpu(one, dtype)
        check(product, one, dtype)
        ids = torch.tensor([[0, 69], [33, 5]])
        assert torch.equal(product.rows(ids), one.whole(dtype)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group", FORMS)
def test_few_bits_stay_few_in_memory(bits, group, dtype):
    product = kernels.multiplier(piece(256, 512, bits, group), dtype, CPU, "a layer")
    held = sum(t.numel() * t.element_size() for t in (*product.parameters(), *product.buffers()))
    # Of 8 bits in bfloat16 there are four numbers of 16 bits for a group, of which each half has a scale and a zero.
    most = bits + (64 if bits == 8 or dtype == torch.float32 else 32) / group
    assert 8 * held <= 1.01 * most * 256 * 512


@pytest.fixture
def alone(monkeypatch):
    """The engine's parameters without its processes."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_kernel_that_vllm_chooses_gets_what_it_takes(group, alone, monkeypatch):
    """On a CPU there is one for 4 bits, by the interface of those for GPUs."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # on cores with AMX it would round its inputs to 8 bits
    for one in (piece(64, 256, 4, group), piece(96, 256, 4, group, torch.arange(70, 200))):
        product = kernels.Chosen(one, torch.bfloat16, CPU)
        assert type(product.kernel).__name__ == "CPUWNA16LinearKernel"
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            pytest.skip("vLLM offers this kernel on any CPU, and its build for cores with AVX2 alone lacks the product")
        check(product, one, torch.bfloat16)


def as_on_a_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    said = {"is_cpu": False, "is_cuda": True, "is_cuda_alike": True}
    for name, value in said.items():
        monkeypatch.setattr(type(current_platform), name, lambda self, value=value: value)
    major, minor = capability
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(
        type(current_platform), "get_device_capability", classmethod(lambda cls, *_: DeviceCapability(major, minor))
    )
    monkeypatch.setattr(
        type(current_platform),
        "is_device_capability",
        classmethod(lambda cls, wanted, *_: wanted in (capability, 10 * major + minor)),
    )


@pytest.mark.parametrize("bits, group", FORMS)
@pytest.mark.parametrize("own", [None, slice(37, 201)])
def test_marlin_gets_the_codes_as_it_packs_them(bits, group, own, alone, monkeypatch):
    """As far as that can be seen without a GPU: what is handed to its repacking, with which sizes, and the inputs."""
    one = piece(128, 384, bits, group, None if own is None else torch.arange(384)[own])
    handed = {}

    def repack(packed, *, size_k, size_n, num_bits, is_a_8bit, **_):
        numbers = unpack_quantized_values_into_int32(packed, kernels.TYPES[num_bits], packed_dim=0)
        assert numbers.shape == (size_k, size_n) and not is_a_8bit
        handed["codes"] = numbers - 2 ** (num_bits - 1)
        return packed

    def permute(scale, *, size_k, size_n, group_size, **_):
        assert scale.shape == (size_k // group_size, size_n)
        handed["scale"] = scale
        return scale

    def apply(input, wtype, input_size_per_partition, output_size_per_partition, **_):
        assert (input_size_per_partition, output_size_per_partition) == (one.width, 128)
        scale = handed["scale"].float().repeat_interleave(group, 0)
        whole = handed["codes"][: one.width] * scale[: one.width]
        return (input.float() @ whole[:, :128]).to(input.dtype)

    as_on_a_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(marlin.ops, "gptq_marlin_repack", repack, raising=False)
    monkeypatch.setattr(marlin, "marlin_permute_scales", permute)
    monkeypatch.setattr(marlin, "apply_gptq_marlin_linear", apply)
    product = kernels.multiplier(one, torch.bfloat16, CPU, "a layer")
    assert isinstance(product, kernels.Chosen) and isinstance(product.kernel, MarlinLinearKernel)
    check(product, one, torch.bfloat16)


@pytest.mark.parametrize(
    "capability, dtype, why",
    [((8, 0), torch.float32, "compute in 16 bits, not in torch.float32"), ((6, 0), torch.bfloat16, "Marlin")],
)
def test_without_a_kernel_the_matrix_is_made_whole_and_named(capability, dtype, why, alone, monkeypatch, caplog):
    as_on_a_gpu(monkeypatch, capability)
    one = piece(128, 256, 8, 64)
    monkeypatch.setattr(kernels, "Product", lambda weight: weight)
    with caplog.at_level(logging.WARNING):
        weight = kernels.multiplier(one, dtype, CPU, "model.layers.3.mlp.down_proj")
    assert torch.equal(weight, one.whole(dtype))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lillama.serving.kernels"]
    assert said.startswith("model.layers.3.mlp.down_proj: 128 x 256 numbers of 8 bits were made whole when loaded:")
    assert why in said
