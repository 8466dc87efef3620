"""Fisher factors of experts: per expert as if it were linears of its own, and of use where an expert saw nothing."""

from __future__ import annotations

import pytest
import torch
from test_mixtral import LAYERS
from test_mixtral import tiny as tiny_mixtral
from test_sensitivity import kept, kronecker, recipe, run_back
from torch import nn
from transformers import AutoModelForCausalLM

import lillama
from lillama.dense.experts import PROJECTIONS, layout_of
from lillama.factorise import initialisers as init
from lillama.factorise.kfac import Sums, _Experts, _Shared
from lillama.run import pipeline


def dense_weight(module, projection):
    return layout_of(module).weight(module, projection)


class Spelled(nn.Module):
    """Experts written out: a linear for every projection of each."""

    def __init__(self, fused) -> None:
        super().__init__()
        self.act = fused.act_fn
        for name in PROJECTIONS:
            for e, W in enumerate(dense_weight(fused, name)):
                linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
                linear.weight = nn.Parameter(W.clone(), requires_grad=False)
                self.add_module(f"{name}{e}", linear)
        self.experts = len(dense_weight(fused, "down"))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.experts):
            token, choice = torch.where(top_k_index == e)
            gate, up, down = (self.get_submodule(f"{name}{e}") for name in PROJECTIONS)
            x = hidden_states[token]
            out = out.index_add(0, token, down(self.act(gate(x)) * up(x)) * top_k_weights[token, choice, None])
        return out


def test_experts_are_measured_as_linears_of_their_own(tmp_path, monkeypatch):
    given = recipe(tmp_path, tiny_mixtral())
    found = kept(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 97, (4, 32), generator=generator)} for _ in range(6)]
    result = pipeline.compress(given, batches=batches)
    assert {name.rpartition(".")[2] for name in result.plan.ranks} >= {"gate", "up"}
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval().requires_grad_(False)
    seen: dict[str, list[torch.Tensor]] = {}

    def listen(name):
        def hook(_, args, out):
            seen.setdefault(name, []).append(args[0])
            out.register_hook(lambda gradient: seen[name].append(gradient))

        return hook

    for layer in LAYERS:
        spelled = Spelled(model.get_submodule(layer)).double()
        model.set_submodule(layer, spelled)
        for name in (f"{p}{e}" for p in PROJECTIONS for e in range(spelled.experts)):
            spelled.get_submodule(name).register_forward_hook(listen(f"{layer}.{name}"))
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_(True))
    tokens = run_back(model, batches)
    for layer in LAYERS:
        for projection in PROJECTIONS:
            spectrum = torch.zeros(32, dtype=torch.float64)
            for e in range(4):
                name = f"{layer}.{projection}{e}"
                W = model.get_submodule(name).weight
                assert sum(map(len, seen[name][::2])) >= 32, "none borrows"
                H, G = kronecker(seen[name][::2], seen[name][1::2], tokens)
                wide = W.shape[0] <= W.shape[1]
                both = (W @ H @ W.T, G) if wide else (H, W.T @ G @ W)
                for side, exact in zip(("input", "output"), both):
                    mine = found[f"{layer}.{projection}.{side}"][e].double()
                    assert torch.allclose(mine, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
                spectrum += init.fisher_spectrum(W, *both)
            assert torch.allclose(found[f"{layer}.{projection}.spectrum"], spectrum, rtol=1e-3, atol=1e-9)


def test_an_expert_that_saw_nothing_starts_where_the_layers_inputs_want_it():
    experts = tiny_mixtral().model.layers[0].mlp.experts
    sums = {name: [Sums(one) for one in dense_weight(experts, name)] for name in PROJECTIONS}
    listener = _Experts(experts, sums)
    generator = torch.Generator().manual_seed(0)
    hidden, gradient = (torch.randn(200, 32, generator=generator) for _ in range(2))
    hidden = hidden * torch.logspace(-1, 1, 32)
    index = torch.randint(0, 3, (200, 1), generator=generator)  # never the last one
    listener.add(hidden, index, torch.ones(200, 1), gradient)
    listener.close()
    for name in PROJECTIONS:
        starved = sums[name][3]
        assert starved.rows == 0 and sums[name][0].rows > 32
        factors = starved.factors(200)
        A, B = init.fisher(starved.W, 8, *factors)
        assert torch.isfinite(A @ B).all() and float(init.fisher_spectrum(starved.W, *factors).max()) < 1e-20
        if name == "down":
            continue
        lost = hidden.double() @ (starved.W - A @ B).T.double()
        U, V = init.svd(starved.W, 8)
        assert lost.norm() < (hidden.double() @ (starved.W - U @ V).T.double()).norm()


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_experts_are_measured_in_every_precision(tmp_path, compute):
    wanted = recipe(tmp_path, tiny_mixtral()).model_dump()
    wanted["run"]["compute"] = compute
    result = pipeline.compress(pipeline.Recipe.parse(wanted))
    assert len(result.plan.ranks) and not result.plan.provisional


def test_weights_of_a_group_count_an_input_once_and_again_where_it_comes_again():
    shared, x, y = _Shared(Sums(torch.ones(3, 2))), torch.ones(1, 2), torch.ones(1, 2)
    came = [(x, "gate"), (x, "up"), (x, "gate"), (x, "up"), (y, "up"), (y, "gate")]
    assert [shared.has(*one) for one in came] == [False, True, False, True, False, True]
