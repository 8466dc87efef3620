"""A compressed model is traced whole by torch.compile, and generates with a static cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GQA
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from lillama.checkpoint.quantizer import factorise_

NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def compressed(storage: str) -> Any:
    """A tiny model with low-rank linears, and a low-rank embedding that its head shares."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**GQA, "num_hidden_layers": 1}, tie_word_embeddings=True))
    how = {"storage": storage, "rank": 8}
    modules: dict[str, Any] = {f"model.layers.0.{name}": {"kind": "linear", **how} for name in NAMES}
    modules["model.embed_tokens"] = {"kind": "embedding", **how}
    modules["lm_head"] = {"kind": "linear", "tied": "model.embed_tokens", **how}
    return factorise_(model, modules).eval()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_no_graph_breaks_and_the_outputs_are_the_same(storage: str) -> None:
    model = compressed(storage)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor would need a compiler for C++
    with torch.no_grad():
        torch.testing.assert_close(traced(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    # And where a gradient comes back.
    traced = torch.compile(model, fullgraph=True, backend="eager")
    traced(input_ids=IDS).logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(storage: str) -> None:
    model, prompt = compressed(storage), IDS[:, :6]
    wanted = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **wanted)
    assert torch.equal(model.generate(prompt, cache_implementation="static", disable_compile=True, **wanted), expected)
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # transformers compiles on accelerators alone, unless told otherwise
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = model.generate(prompt, cache_implementation="static", compile_config=settings, **wanted)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before  # it was compiled indeed


def test_products_written_in_place_are_those_with_a_gradient() -> None:
    model = compressed("pivoted")
    with torch.no_grad():
        written = model(input_ids=IDS).logits
    torch.testing.assert_close(written, model(input_ids=IDS).logits.detach(), rtol=1e-5, atol=1e-5)
    linear = model.model.layers[0].mlp.up_proj
    for shape in ((32,), (1, 32), (9, 32), (3, 4, 32), (0, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(9, 32)).dtype == torch.bfloat16
