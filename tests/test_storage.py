"""A storage format is one class: one that nobody here knows is registered from outside and passes the contract."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from test_mixtral import tiny as tiny_mixtral
from torch.nn import functional as F

import lillama
from lillama import LillamaError, host, registry
from lillama.checkpoint.quantizer import factorise_
from lillama.factorise.initialisers import svd
from lillama.lowrank import swap
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.lowrank.factors import FactorStorage
from lillama.lowrank.linear import LowRankLinear
from lillama.lowrank.storage import ONE_MATRIX, Factors, Storage, get_storage
from lillama.lowrank.swap import factor_modules
from lillama.testing import check_architecture, full_rank_plan, one_and_the_same, recipe_for, token_batches


class Transposed(Storage):
    """Both factors lying down, in tensors of other names than any format here has; they learn themselves."""

    parameters = ("P", "Q")
    indices = ("turns",)
    trained_as = None

    def shapes(self, d_out, d_in, rank):
        return {"P": (rank, d_out), "Q": (d_in, rank), "turns": (2,)}

    def encode(self, A, B):
        return {"P": A.T, "Q": B.T, "turns": torch.tensor([1, 1])}

    def decode(self, tensors):
        return Factors(tensors["P"].mT, tensors["Q"].mT)

    def multiply(self, x, tensors, derived, products=ONE_MATRIX, bias=None):
        return products.linear(products.linear(x, tensors["Q"].mT), tensors["P"].mT, bias)


class Scaled(FactorStorage):
    """Factors that are made from others once they have learned, and hold more numbers than those."""

    parameters = ("U", "S", "V")
    trained_as = "factors"

    def shapes(self, d_out, d_in, rank):
        return {"U": (d_out, rank), "S": (1, rank), "V": (rank, d_in)}

    def encode(self, A, B):
        length = A.norm(dim=0, keepdim=True)
        return {"U": A / length, "S": length, "V": B}

    def decode(self, tensors):
        return Factors(tensors["U"] * tensors["S"], tensors["V"])

    def multiply(self, x, tensors, derived, products=ONE_MATRIX, bias=None):
        return products.linear(products.linear(x, tensors["V"]), tensors["U"] * tensors["S"], bias)

    look_up = Storage.look_up


FORMATS = {"transposed": Transposed, "scaled": Scaled}

# In a fresh process the format has to be registered again, as a plugin would: by an import.
OUTSIDE = """
import sys
sys.path[:0] = {path!r}
from lillama import registry
from test_storage import FORMATS
for name, cls in FORMATS.items():
    registry.STORAGES.add(name, cls)
"""


@pytest.fixture
def formats(monkeypatch, tmp_path):
    """Both formats registered, here and in every process that the contract starts."""
    monkeypatch.setattr(registry.STORAGES, "_targets", {**registry.STORAGES._targets, **FORMATS})
    (tmp_path / "site").mkdir()
    paths = [str(Path(__file__).parent), *sys.path]
    (tmp_path / "site" / "sitecustomize.py").write_text(OUTSIDE.format(path=paths))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    return sorted(FORMATS)


@pytest.mark.parametrize(
    ("build", "plugin"),
    [
        (lambda: tiny("llama-bias"), "decoder"),
        pytest.param(tiny, "inkuba", marks=pytest.mark.slow),
        pytest.param(tiny_mixtral, "mixtral", marks=pytest.mark.slow),
    ],
)
def test_formats_from_outside_pass_the_contract(build, plugin, formats, tmp_path):
    check_architecture(build(), tmp_path / "contract", plugin=plugin, storages=formats)


@pytest.mark.parametrize("name", ["factors", "pivoted", *FORMATS])
def test_every_format_says_how_many_numbers_it_holds(name, formats):
    storage = get_storage(name)
    for shape in ((7, 12, 5), (12, 7, 7), (9, 9, 1)):
        module = LowRankLinear(storage, shape[1], shape[0], shape[2])
        held = dict(module.named_parameters())
        assert set(held) == set(storage.parameters) and set(dict(module.named_buffers())) == set(storage.indices)
        assert sum(p.numel() for p in held.values()) == storage.numbers(*shape)
    counts = [storage.numbers(20, 30, rank) for rank in range(1, 20)]
    assert counts == sorted(counts), "largest_rank looks for a rank by halving"


def test_what_is_no_format_is_refused(monkeypatch):
    monkeypatch.setattr(registry.STORAGES, "_targets", {**registry.STORAGES._targets, "odd": lambda: None})
    with pytest.raises(LillamaError, match="no subclass of"):
        get_storage("odd")
    with pytest.raises(LillamaError, match="Did you mean 'pivoted'"):
        get_storage("pivotal")


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("plugin", ["decoder", "inkuba"])
def test_a_model_in_memory_is_factorised_saved_and_loaded(storage, plugin, tmp_path):
    model = tiny()
    inputs = token_batches(model)[0]
    with torch.no_grad():
        expected = model(**inputs).logits
    layers = host.get().layers(model, recipe_for(Path("model"), Path("run"), plugin))[1]
    plan = full_rank_plan(layers, sum(p.numel() for p in model.parameters()), storage)
    assert lillama.factorise_(model, plan) is model
    with torch.no_grad():
        found = model(**inputs).logits
    assert float((found - expected).abs().max()) <= 1e-5, "full rank changes nothing"
    assert {name for name, _ in factor_modules(model)} == set(plan.ranks)
    assert sum(p.numel() for p in model.parameters()) == plan.after
    model.save_pretrained(tmp_path / "saved")
    loaded = lillama.load(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, found)
    assert one_and_the_same(loaded) == one_and_the_same(model)


def test_factorise_says_what_the_model_lacks():
    plan = {"model.layers.9.mlp.up_proj": {"kind": "linear", "storage": "factors", "rank": 4}}
    with pytest.raises(LillamaError, match=r"layers\.9.*no such module"):
        factorise_(tiny(), plan)
    plan = {"model.layers.0.input_layernorm": {"kind": "linear", "storage": "factors", "rank": 4}}
    with pytest.raises(LillamaError, match="the plan has linear here"):
        factorise_(tiny(), plan)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_modules_compile_without_a_graph_break(storage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 20, bias=False))
    model = factorise_in_place(model, storage)
    x = torch.randn(5, 12)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch._dynamo.reset()
        for _, module in factor_modules(model):  # as after loading: nothing is derived yet
            for matrix in module.matrices().values():
                matrix.forget_derived()
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), expected)


def factorise_in_place(model, storage):
    for name, module in list(model.named_children()):
        W = module.weight.detach()
        swap.replace(model, name, kind="linear", storage=storage, rank=4)
        swap.set_factors(model, name, "linear", *svd(W, 4))
    return model


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_generation_with_a_static_cache_writes_the_same(storage):
    model = tiny("llama")
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    factorise_(model, {name: {"kind": "linear", "storage": storage, "rank": 8} for name in names})
    ids = token_batches(model, batches=1)[0]["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), plain)
    assert plain.shape[1] == ids.shape[1] + 6


def test_a_table_of_a_format_without_its_own_look_up_is_looked_up():
    module = LowRankEmbedding(Scaled(), 11, 6, 3)
    A, B = torch.randn(11, 3), torch.randn(3, 6)
    module.set_factors(A, B)
    ids = torch.tensor([[0, 10], [3, 3]])
    torch.testing.assert_close(module(ids), F.embedding(ids, A @ B), rtol=1e-4, atol=1e-5)
