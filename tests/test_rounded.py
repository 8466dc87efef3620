"""Codes and scales: how numbers become them, how they are kept, what a checkpoint says of them and may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_mixtral import tiny as tiny_mixtral
from torch import Tensor
from torch.nn import functional as F

import lillama
from lillama.base.device import choose
from lillama.base.progress import Progress
from lillama.bits.stage import quantise_model
from lillama.checkpoint.quantizer import LillamaConfig, factorise_
from lillama.errors import LillamaError
from lillama.lowrank.coded import BITS, GROUPS, Coded, find_scales, pack, round_nearest, spread, unpack
from lillama.lowrank.rounded import Rounded, read_name
from lillama.lowrank.storage import empty_tensors, get_storage
from lillama.lowrank.swap import count_parameters, factor_modules
from lillama.recipe.schema import Quantize

bits_ = st.sampled_from(BITS)
group_ = st.sampled_from(GROUPS)


@st.composite
def matrices(draw: Any) -> Tensor:
    """Of any width, rows of very different sizes, some of them nothing."""
    rows, columns, seed = draw(st.integers(1, 4)), draw(st.integers(1, 150)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([draw(st.sampled_from([0.0, 1e-6, 0.02, 1.0, 300.0])) for _ in range(rows)])
    return torch.randn(rows, columns, generator=generator) * sizes[:, None]


@given(bits_, st.integers(0, 3), st.integers(0, 9), st.integers(0, 2**16))
def test_what_is_packed_comes_back(bits: int, rows: int, pairs: int, seed: int) -> None:
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (2, rows, 2 * pairs), generator=torch.Generator().manual_seed(seed))
    kept = pack(codes.float(), bits)
    assert kept.dtype == (torch.int8 if bits == 8 else torch.uint8) and kept.shape == (2, rows, 2 * pairs * bits // 8)
    assert torch.equal(unpack(kept, bits), codes.to(torch.int8))


def test_the_layout_of_the_file_is_the_one_that_is_documented() -> None:
    """docs/checkpoint.md: the even column in the lower half, two's complement."""
    assert pack(torch.tensor([[1.0, -1.0, -8.0, 7.0]]), 4).tolist() == [[0xF1, 0x78]]


@given(matrices(), bits_, group_)
def test_a_number_is_off_by_half_a_step_and_at_the_ends_by_a_step_more(W: Tensor, bits: int, group: int) -> None:
    codes, scales = round_nearest(W, bits, group)
    most = 2 ** (bits - 1)
    assert torch.equal(codes, codes.round()) and bool((codes >= -most).all()) and bool((codes < most).all())
    assert torch.equal(scales, scales.bfloat16().float()) and bool((scales != 0).all())
    assert scales.shape == (len(W), -(-W.shape[1] // group))
    step = spread(scales, group, W.shape[1]).abs()
    off = (codes * spread(scales, group, W.shape[1]) - W).abs()
    inside = (codes > -most) & (codes < most - 1)
    assert bool((off <= 0.5001 * step)[inside].all())
    if bits == 8:  # scales of 4 bits may cut the largest numbers off where the others gain more
        assert bool((off <= 1.5 * step).all())


@given(matrices(), bits_, group_)
def test_a_group_depends_on_its_own_numbers_and_nothing_stays_nothing(W: Tensor, bits: int, group: int) -> None:
    codes, scales = round_nearest(W, bits, group)
    for start in range(0, W.shape[1], group):
        part = W[:, start : start + group]
        own = round_nearest(part, bits, group)
        assert torch.equal(codes[:, start : start + group], own[0])
        assert torch.equal(scales[:, start // group], own[1][:, 0])
    assert not codes[W.abs().amax(1) == 0].any()
    turned, other = round_nearest(-W, bits, group)
    assert torch.equal(turned * spread(other, group, W.shape[1]), -codes * spread(scales, group, W.shape[1]))


@given(matrices(), group_)
def test_scales_of_4_bits_lose_no_more_than_those_that_reach_the_largest(W: Tensor, group: int) -> None:
    def lost(scales: Tensor) -> Tensor:
        each = spread(scales, group, W.shape[1])
        return ((W / each).round().clamp(-8, 7) * each - W).square().sum(1)

    padded = F.pad(W, (0, -W.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))[..., 0]
    plain = (-largest / 8).bfloat16().float()
    plain = torch.where(plain == 0, torch.ones_like(plain), plain)
    assert bool((lost(find_scales(W, 4, group)) <= lost(plain) * 1.0001 + 1e-30).all())


@given(st.sampled_from(["factors", "pivoted", "dense"]), bits_, group_, st.integers(1, 9), st.integers(1, 60))
def test_a_storage_has_the_shapes_types_and_bytes_that_it_says(
    base: str, bits: int, group: int, half_rank: int, half_width: int
) -> None:
    rank, d_out, d_in = 2 * half_rank, 24, max(2 * half_width, 2 * half_rank)
    storage = get_storage(f"{base}:{bits}:{group}")
    assert isinstance(storage, Rounded) and storage.is_even(d_out, d_in, rank)
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    held = storage.encode(A, B)
    shapes = storage.shapes(d_out, d_in, rank)
    assert {suffix: tuple(tensor.shape) for suffix, tensor in held.items()} == shapes
    empty = empty_tensors(storage, (d_out, d_in), rank, {})
    assert [(s, t.shape) for s, t in empty.items() if s in storage.indices] == [
        (s, t.shape) for s, t in empty.items() if t.dtype != torch.float32
    ]
    assert all(held[s].dtype == empty[s].dtype for s in storage.shared_indices)
    count = sum(t.numel() * (2 if s in storage.narrow else 1) for s, t in held.items() if s not in storage.base.indices)
    assert storage.bytes(d_out, d_in, rank, 2) == count
    # What computes with codes computes with the numbers that they stand for.
    x = torch.randn(3, d_in, generator=generator)
    W = storage.product(held, storage.derive(held))
    assert torch.allclose(storage.multiply(x, held, storage.derive(held)), x @ W.T, atol=1e-3)
    ids = torch.tensor([[0, d_out - 1], [3, 3]])
    assert torch.allclose(storage.look_up(ids, held, storage.derive(held)), W[ids], atol=1e-4)


def test_codes_stand_for_a_matrix_wherever_one_is_taken() -> None:
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    codes, scales = round_nearest(W, 4, 32)
    coded = Coded(pack(codes, 4), scales, 4, 32)
    whole = coded.whole()
    assert coded.shape == W.shape and len(coded) == 6 and coded.dtype == torch.float32
    assert torch.equal(F.linear(torch.eye(40), coded), whole.T) and torch.equal(coded.T, whole.T)
    assert torch.equal(coded[2:4].whole(), whole[2:4])
    assert torch.equal(F.embedding(torch.tensor([5, 0]), coded), whole[[5, 0]])
    assert torch.allclose(whole, W, atol=0.3)


@pytest.mark.parametrize("name", ["pivoted:5:32", "pivoted:4:48", "pivoted:4", "pivoted:", "pivoted:4:32:8", "x:08:32"])
def test_bits_that_are_not_known_are_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(LillamaError, match=f"'{name}' is none of this version") as caught:
        read_name(name)
    assert "4:32" in str(caught.value.hint)
    with pytest.raises(LillamaError, match="none of this version"):
        get_storage(name)


def test_a_format_that_nobody_registered_is_named() -> None:
    assert read_name("pivoted") is None and read_name("pivoted:8:128") == ("pivoted", 8, 128)
    with pytest.raises(LillamaError, match="pivotd"):
        get_storage("pivotd:4:32")


def how(**changes: Any) -> dict[str, Any]:
    return {"kind": "linear", "storage": "pivoted:4:32", "rank": 8} | changes


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"storage": "pivoted:3:32"}, "none of this version: '3:32'"),
        ({"storage": "dense:4:0"}, "none of this version"),
        ({"storage": "pivoted:4:32", "rank": 0}, "'rank' is 0"),
        ({"storage": "dense:8:32", "rank": True}, "'rank' is True"),
        ({"storage": ["pivoted:4:32"]}, "not a name"),
        ({"tied": "model.embed_tokens"}, "no embedding of its storage and rank"),
    ],
)
def test_a_description_that_is_wrong_is_refused_by_the_modules_name(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(LillamaError, match=what) as caught:
        LillamaConfig({"model.layers.0.mlp.up_proj": how(**changes)})
    assert caught.value.where == "quantization_config: model.layers.0.mlp.up_proj" and caught.value.hint


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"storage": "dense:8:32", "rank": 33}, "a matrix of 48 x 32 has no rank 33"),
        ({"storage": "factors:4:32", "rank": 7}, "of 48 x 32 numbers of rank 7 a tensor has an odd number of them"),
        ({"storage": "pivotd:4:32"}, "pivotd"),
        ({"kind": "embedding", "storage": "dense:8:32"}, "embedding here"),
    ],
)
def test_a_description_that_does_not_fit_the_model_is_refused(changes: dict[str, Any], what: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(LillamaError, match=what) as caught:
        factorise_(tiny().to("meta"), {name: how(**changes)})
    assert name in str(caught.value.where)


def test_the_version_is_the_least_that_reads_what_is_there_and_a_newer_one_is_refused() -> None:
    name = "model.layers.0.mlp.up_proj"
    assert LillamaConfig({name: how(storage="pivoted")}).version == 1
    assert LillamaConfig({name: how(storage="pivoted")}, version=1).to_dict()["version"] == 1
    assert LillamaConfig({name: how(), "other": how(storage="factors")}).version == 2
    assert (
        LillamaConfig({}, shapes={name: [8, 4]}).version
        == LillamaConfig({name: how()}, shapes={name: [8, 4]}).version
        == 3
    )
    with pytest.raises(LillamaError, match="of format version 4, this lillama reads up to 3") as caught:
        LillamaConfig({name: how()}, version=4)
    assert caught.value.hint == "Upgrade lillama."
    for wrong in (0, "2", True):
        with pytest.raises(LillamaError, match="not a whole number above 0"):
            LillamaConfig({name: how()}, version=wrong)  # type: ignore[arg-type]


def few(model: Any, **section: Any) -> Any:
    kinds = ("gate", "up", "down")
    offered: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name and not name.endswith("gate"):
            offered.append((name, "linear"))
        if name.endswith(".experts"):
            offered += [(f"{name}.{kind}", "experts") for kind in kinds]
    given = Quantize.model_validate({"bits": 4, "method": "nearest", "what": "all", **section})
    quantise_model(model, given, offered=offered, device=choose("cpu", "float32"), progress=Progress())
    return model


def same(model: Any, other: Any) -> None:
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize("make", [tiny, lambda: tiny("llama-bias"), tiny_mixtral], ids=["tied", "untied", "experts"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_survive_saving_and_loading(make: Any, bits: int, tmp_path: Path) -> None:
    plain = make().eval()
    count = sum(p.numel() for p in plain.parameters())
    model = few(plain, bits=bits)
    assert count_parameters(model) == count, "few bits hold as many numbers"
    model.save_pretrained(tmp_path / "a")
    again = lillama.load(tmp_path / "a", dtype=torch.float32)
    same(model, again)
    again.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / place / "model.safetensors") for place in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for key, tensor in first.items():
        if key.endswith("_scale"):
            assert tensor.dtype == torch.bfloat16
        if key.endswith("_codes"):
            assert tensor.dtype in (torch.int8, torch.uint8)
    again.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    same(model, lillama.load(tmp_path / "shards", dtype=torch.float32))


def test_a_tied_head_of_pivot_rows_has_their_numbers_too(tmp_path: Path) -> None:
    ends = {
        "model.embed_tokens": {"kind": "embedding", "storage": "pivoted", "rank": 12},
        "lm_head": {"kind": "linear", "storage": "pivoted", "rank": 12, "tied": "model.embed_tokens"},
    }
    model = few(factorise_(tiny(), ends), embedding=4)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {key for key in held if key.startswith("lm_head")} == {"lm_head.pivots", "lm_head.weight"}
    assert held["model.embed_tokens.C_codes"].shape == (85, 6)
    same(model, lillama.load(tmp_path, dtype=torch.float32))


def test_a_changed_description_in_a_checkpoint_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    few(tiny()).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    held = json.loads(config.read_text())
    name = "model.layers.0.mlp.up_proj"
    for changes in ({"storage": "dense:8:32"}, {"storage": "dense:4:64"}, {"storage": "dense:2:32"}, {"rank": 99}):
        said = json.loads(json.dumps(held))
        said["quantization_config"]["modules"][name] |= changes
        config.write_text(json.dumps(said))
        if changes == {"storage": "dense:4:64"}:
            continue  # of 32 columns both have one group
        with pytest.raises(LillamaError):
            lillama.load(tmp_path)


def test_experts_whose_columns_are_odd_stay_what_they_were(tmp_path: Path) -> None:
    """No projection fits into whole bytes: the checkpoint does not speak of the module, and loads."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 33, "intermediate_size": 35, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = few(MixtralForCausalLM(MixtralConfig(**sizes, **heads)).float(), what="linears")
    names = [name for name, _ in factor_modules(model)]
    assert names == ["model.layers.0.self_attn.o_proj"], "of 16 columns"
    model.save_pretrained(tmp_path)
    again, held = lillama.load(tmp_path, dtype=torch.float32).state_dict(), model.state_dict()
    assert again.keys() == held.keys() and all(torch.equal(again[key], held[key]) for key in held)
