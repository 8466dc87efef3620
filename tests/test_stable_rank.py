"""Stable ranks of weights and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixtral import tiny as tiny_mixtral
from torch import nn

from lillama.checkpoint.quantizer import factorise_
from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.stable_rank import layers_of, of_matrix, stable_rank
from lillama.lowrank import swap as factors


def exact(matrix: Any) -> float:
    values = torch.linalg.svdvals(matrix.double()) ** 2
    return float(values.sum() / values.max())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25)
def test_of_a_matrix_it_is_that_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert of_matrix(matrix) == pytest.approx(exact(matrix), rel=1e-3)


def test_extremes() -> None:
    assert of_matrix(torch.eye(7)) == pytest.approx(7)
    assert of_matrix(torch.outer(torch.ones(5), torch.arange(1.0, 4.0))) == pytest.approx(1)
    assert of_matrix(torch.zeros(3, 3)) == 0
    assert of_matrix(torch.stack([torch.eye(4), torch.ones(4, 4)])) == pytest.approx(2.5), "the mean of a stack"


def test_every_matrix_of_every_layer_and_what_layers_put_out(tmp_path: Path) -> None:
    model = tiny("mistral")
    (tmp_path / "a.txt").write_text("the cat sat on a mat and ran " * 20)
    context = Context(tokenizer(), "cpu")
    model.train()
    means = stable_rank(model, context, dataset=str(tmp_path / "a.txt"), tokens=40, sequence_length=20)
    assert model.training
    rows = context.details["rows"]
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "activations"]  # fmt: skip
    assert list(means) == kinds and len(rows) == 3 * 8
    value = {(row["layer"], row["kind"]): row["value"] for row in rows}
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    assert value[1, "mlp.up_proj"] == pytest.approx(exact(weight), rel=1e-3)
    assert means["mlp.up_proj"] == pytest.approx(sum(value[i, "mlp.up_proj"] for i in range(3)) / 3)
    ids = torch.tensor(tokenizer()((tmp_path / "a.txt").read_text())["input_ids"][:40]).view(2, 20)
    outputs: list[Any] = []
    model.eval()
    handle = model.model.layers[2].register_forward_hook(lambda m, i, o: outputs.append(o))
    with torch.no_grad():
        model(ids)
    handle.remove()
    assert value[2, "activations"] == pytest.approx(exact(outputs[0].flatten(0, 1)), rel=1e-3)
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left behind"


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_of_a_factorised_weight_it_is_that_of_the_product(storage: str) -> None:
    model = tiny("mistral")
    layer = model.model.layers[0]
    W = layer.mlp.up_proj.weight.detach().clone()
    U, S, V = torch.linalg.svd(W)
    factors.replace(layer, "mlp.up_proj", kind="linear", storage="factors", rank=4)
    factors.set_factors(layer, "mlp.up_proj", "linear", U[:, :4] * S[:4], V[:4])
    factors.store_as(layer, "mlp.up_proj", "linear", storage)
    means = stable_rank(model, context := Context(None, "cpu"))
    found = [row["value"] for row in context.details["rows"] if row["kind"] == "mlp.up_proj"]
    assert len(found) == 3 and found[0] == pytest.approx(float(S[:4].square().sum() / S[0] ** 2), rel=1e-3)
    assert "activations" not in means


def test_experts_inside_layers_are_not_taken_for_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    assert layers_of(model) == list(model.layers)
    with pytest.raises(LillamaError, match="no list of equal layers"):
        stable_rank(nn.Linear(2, 2), Context(None, "cpu"))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_experts_in_factors_count_with_their_products(storage: str) -> None:
    model = tiny_mixtral()
    names = [f"model.layers.{i}.mlp.experts.{projection}" for i in range(2) for projection in ("gate", "down")]
    factorise_(model, {name: {"kind": "experts", "storage": storage, "rank": 8} for name in names})
    context = Context(tokenizer(), "cpu")
    stable_rank(model, context)
    value = {(row["layer"], row["kind"]): row["value"] for row in context.details["rows"]}
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    for projection in ("gate", "down"):
        stack = experts.weight(projection).detach()
        expected = sum(exact(one) for one in stack) / len(stack)
        assert value[1, f"mlp.experts.{projection}"] == pytest.approx(expected, rel=1e-3)
    assert value[0, "mlp.experts.up_W"] > 8, "what stays dense counts as it is"
