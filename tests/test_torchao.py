"""torchao quantises the factors of a compressed model, which it finds as `nn.Linear` children."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from conftest import GQA
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lillama
from lillama.checkpoint.quantizer import factorise_
from lillama.errors import LillamaError
from lillama.lowrank.module import is_quantised
from lillama.lowrank.swap import factor_modules

logging.getLogger("torchao").setLevel(logging.ERROR)  # it names the CUDA libraries that it could not load
quantization = pytest.importorskip("torchao.quantization")

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
INT4 = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
CONFIGS = {  # what runs on a CPU, and how far logits may move (found: 1.0 to 1.6, 1.4 to 2.2, 18 to 25 %)
    "int8": (quantization.Int8WeightOnlyConfig(), 0.04),
    "int8 inputs": (quantization.Int8DynamicActivationInt8WeightConfig(), 0.06),
    "int4": (quantization.IntxWeightOnlyConfig(**INT4), 0.6),
}


def compressed(storage: str, tied: bool) -> Any:
    """A tiny model all of whose linears are of rank 32, the head's factors its embedding's if tied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**{**GQA, **sizes}, tie_word_embeddings=tied))
    how = {"storage": storage, "rank": 32}
    modules: dict[str, Any] = {n: {"kind": "linear", **how} for n, m in model.named_modules() if type(m) is nn.Linear}
    if tied:
        modules["model.embed_tokens"] = {"kind": "embedding", **how}
        modules["lm_head"]["tied"] = "model.embed_tokens"
    return factorise_(model, modules).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def held_bytes(module: nn.Module) -> int:
    """Bytes of the numbers a module holds, the scales that come with few bits among them."""
    total = 0
    for tensor in module.parameters():
        parts = [getattr(tensor, part) for part in getattr(tensor, "tensor_data_names", ())] or [tensor]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("bits", CONFIGS)
def test_every_factor_of_a_linear_is_quantised(bits: str, storage: str, tied: bool) -> None:
    model, (config, allowed) = compressed(storage, tied), CONFIGS[bits]
    before, names, size = logits(model), list(model.state_dict()), held_bytes(model.model.layers)
    assert not any("linear_" in name for name in names), "no state dict knows of the views"
    quantization.quantize_(model, config)
    linears = [module for _, module in factor_modules(model) if module.kind == "linear"]
    assert len(linears) == 15
    for module in linears:
        assert all(is_quantised(p) for p in module.parameters() if p.numel())  # pivots alone may be all rows
    assert list(model.state_dict()) == names
    assert held_bytes(model.model.layers) < 0.5 * size  # scales weigh much in so small a model
    moved = float((logits(model) - before).norm() / before.norm())
    assert 1e-4 < moved < allowed
    assert model.generate(IDS, **GREEDY).shape == (2, 16)
    if tied:  # an embedding looks rows up: its own stay floating-point numbers
        assert not any(is_quantised(parameter) for parameter in model.model.embed_tokens.parameters())


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_quantised_model_goes_on_as_a_model(storage: str, tmp_path: Any) -> None:
    model = compressed(storage, tied=False)
    model.save_pretrained(tmp_path / "saved")
    exact = logits(model)
    model = lillama.load(tmp_path / "saved").eval()
    assert torch.equal(logits(model), exact)
    quantization.quantize_(model, CONFIGS["int8"][0])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(traced), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    # The format has no place for it, and a state dict of torch's has.
    with pytest.raises(LillamaError, match="kept as Int8Tensor"):
        model.save_pretrained(tmp_path / "again")
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    written.seek(0)
    again = lillama.load(tmp_path / "saved").eval()
    again.load_state_dict(torch.load(written, weights_only=False), assign=True)
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(model.dequantize()), expected, rtol=1e-3, atol=1e-4)


def test_one_factor_alone_is_quantised() -> None:
    model = compressed("pivoted", tied=False)
    before = logits(model)
    quantization.quantize_(
        model, CONFIGS["int8"][0], filter_fn=lambda m, name: name.endswith(("up_proj.linear_C", "q_proj.linear_B"))
    )
    kept = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    assert {name.rpartition("layers.")[2][2:] for name in kept} == {"mlp.up_proj.C", "self_attn.q_proj.B"}
    assert 1e-5 < float((logits(model) - before).norm() / before.norm()) < 0.04


def test_experts_and_tables_stay_as_they_are() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    how, layer = {"storage": "factors", "rank": 32}, "model.layers.0"
    modules: dict[str, Any] = {f"{layer}.mlp.experts.{name}": {"kind": "experts", **how} for name in ("up", "down")}
    modules |= {f"{layer}.self_attn.o_proj": {"kind": "linear", **how}}
    modules |= {"model.embed_tokens": {"kind": "embedding", **how}}
    factorise_(model, modules).eval()
    before = logits(model)
    quantization.quantize_(model, CONFIGS["int8"][0])
    kept = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if is_quantised(parameter)}
    attention = {f"{layer}.self_attn.{name}_proj" for name in "qkvo"}
    assert kept == {*attention, "lm_head"}, "experts are stacks, and a table looks rows up"
    assert 1e-5 < float((logits(model) - before).norm() / before.norm()) < 0.04
