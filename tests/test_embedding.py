"""Embeddings and heads as layers of one weight: modules, statistics, tied factors, what a run leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lillama.contract import Layer, Weight
from lillama.distill import embedding as embedding_
from lillama.errors import LillamaError
from lillama.factorise import embedding
from lillama.factorise.initialisers import svd, whitened
from lillama.factorise.known import WeightStatistics
from lillama.factorise.start import Initialiser
from lillama.lowrank import swap as factors
from lillama.plan.plan import choose_ranks
from lillama.recipe.schema import Compress
from lillama.signature import parameters

V, D = 60, 16


def table(rank: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return W if rank is None else W[:, :rank] @ torch.randn(rank, D, generator=generator, dtype=torch.float64)


def replaced(W: torch.Tensor, storage: str, rank: int, **options) -> nn.Module:
    dense = nn.Embedding(*W.shape, **options, dtype=W.dtype)
    dense.weight = nn.Parameter(W)
    holder = nn.Module()
    holder.table = dense
    factors.replace(holder, "table", kind="embedding", storage="factors", rank=rank)
    factors.set_factors(holder, "table", "embedding", *svd(W, rank))
    factors.store_as(holder, "table", "embedding", storage)
    return holder.table


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("rank", [1, 5, D])
def test_a_low_rank_table_is_looked_up_exactly(storage, rank):
    W = table(rank)
    module = replaced(W, storage, rank)
    ids = torch.arange(V).view(4, 15)
    assert torch.allclose(module(ids), W[ids], atol=1e-9)
    assert torch.allclose(module.weight, W, atol=1e-9)
    numbers = sum(p.numel() for p in module.parameters())
    assert numbers == rank * (V + D) - (rank * rank if storage == "pivoted" else 0)
    dense = factors.to_dense(module)
    assert type(dense) is nn.Embedding and torch.allclose(dense(ids), W[ids], atol=1e-9)
    assert module.kind == "embedding"


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_the_residual_stream_begins_in_full_precision_under_autocast(storage):
    module = replaced(table(4).float(), storage, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.arange(5)).dtype == torch.float32


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_gradients_of_a_table_are_those_of_its_matrix(storage):
    W = table(4)
    module = replaced(W, storage, 4)
    ids = torch.tensor([[3, 3, 0, 59]])
    target = torch.randn(1, 4, D, dtype=torch.float64)
    ((module(ids) - target) ** 2).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    ((module.weight[ids] - target) ** 2).sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, found[name])


def test_an_embedding_that_does_more_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * self.weight.norm()

    holder = nn.Module()
    holder.table = Scaled(V, D)
    with pytest.raises(LillamaError, match="Scaled whose forward is its own"):
        factors.replace(holder, "table", kind="embedding", storage="factors", rank=2)


def factorised(initialise, W, rank, **known):
    """Factors of a table as a run starts them."""
    names = frozenset(parameter.name for parameter in parameters(initialise))
    weight = Weight("table", tuple(W.shape), kind="embedding")
    A, B = Initialiser(initialise, names, 0)(weight, W, rank, WeightStatistics(**known))
    return A.double(), B.double()


def errors(W, A, B):
    return embedding_.row_errors(W, A, B).double()


def test_frequent_tokens_come_first_and_the_floor_keeps_unseen_ones():
    W = table()
    counts = torch.zeros(V, dtype=torch.float64)
    counts[:10], counts[10:20] = 1000.0, 1.0

    def at(floor):
        return errors(W, *factorised(whitened, W, 8, counts=embedding.floored(counts, floor)))

    plain = errors(W, *factorised(svd, W, 8))
    weighted, kept = at(0.0), at(1.0)
    assert weighted[:10].mean() < 0.3 * plain[:10].mean()
    assert kept[20:].mean() < weighted[20:].mean()
    assert kept[:10].mean() < plain[:10].mean()


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, D - 1))
def test_both_uses_beat_the_best_of_either_use(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    W = table(seed=seed)
    counts = torch.rand(V, generator=generator, dtype=torch.float64) ** 4 * 100 + 0.1
    X = torch.randn(200, D, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, D + 1).double())
    H = X.T @ X

    def cost(A, B):
        gap = W - A @ B
        up, out = (counts * gap.square().sum(1)).sum(), (gap @ H * gap).sum()
        return float(up / (counts * W.square().sum(1)).sum() + out / (W @ H * W).sum())

    both = cost(*embedding.both_uses(W, rank, counts, H))
    up = factorised(whitened, W, rank, counts=counts)
    assert both <= cost(*up) * (1 + 1e-6)
    assert both <= cost(*whitened(W, rank, gram=H)) * (1 + 1e-2)


def test_an_initialiser_of_input_grams_alone_says_so():
    with pytest.raises(LillamaError, match="has not"):
        embedding.factorise(svd, frozenset({"gram"}), table(), 4, WeightStatistics(counts=torch.ones(V)))


def test_counts_leave_padding_out_and_groups_cover_the_vocabulary():
    batches = [
        {"input_ids": torch.tensor([[1, 1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": torch.tensor([[1, 1, 1, 3]])},
    ]
    counts = embedding.token_counts(batches, 6)
    assert counts.tolist() == [0, 5, 1, 1, 0, 0]
    groups = embedding_.frequency_groups(counts)
    assert groups["frequent"].nonzero().flatten().tolist() == [1, 2]
    assert groups["rare"].nonzero().flatten().tolist() == [3]
    assert groups["unseen"].nonzero().flatten().tolist() == [0, 4, 5]
    report = embedding_.by_frequency(torch.tensor([9.0, 1.0, 2.0, 3.0, 9.0, 9.0]), counts)
    assert report == pytest.approx({"frequent": 1.5, "rare": 3.0, "unseen": 9.0, "mean": 10 / 7})


def test_a_tied_weight_is_counted_once_and_has_the_ranks_of_its_embedding():
    low = Layer("up", (Weight("up", (100, 20), kind="embedding"),), "embedding")
    top = Layer("out", (Weight("out", (100, 20), tied="up"),), "head")
    compress = Compress(reduction=0.5, of="weights", rank_multiple=1, strategy="uniform", storage="factors")
    plan = choose_ranks([low, top], 2500, compress)
    assert plan.ranks["up"] == plan.ranks["out"] == 8
    assert plan.after == 2500 - 2000 + 8 * 120
    assert plan.modules()["out"]["tied"] == "up"
    for name in ("up", "out"):
        with pytest.raises(LillamaError, match="no ranks reach"):
            choose_ranks([low, top], 2500, compress.model_copy(update={"skip": [name]}))
