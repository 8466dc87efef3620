"""What predictions are sensitive to: measured layer by layer as by the whole model at once, and spent where it pays."""

from __future__ import annotations

import gc
import itertools
import json
import weakref

import pytest
import torch
from conftest import tiny
from conftest import tokenizer as word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_models import folder, save
from test_mixtral import tiny as tiny_mixtral
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, MambaConfig

import lillama
from lillama.base import device
from lillama.base.progress import Progress
from lillama.base.rundir import RunDirectory
from lillama.contract import Layer, Weight
from lillama.errors import LillamaError
from lillama.factorise import initialisers as init
from lillama.factorise import kfac, sensitivity
from lillama.plan import fisher as allocate
from lillama.pretrained.order import drawn_order
from lillama.pretrained.predictions import draw_tokens
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Compress, Recipe
from lillama.run import pipeline, prepare


def recipe(home, model=None, **compress) -> Recipe:
    (model or tiny()).save_pretrained(home / "model")
    word_tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text("the cat sat on a mat and ran . " * 60)
    text = str(home / "text.txt")
    wanted = {"reduction": 0.3, "of": "weights", "rank_multiple": 2, "strategy": "fisher", "init": "fisher", **compress}
    return Recipe.parse(
        {
            "model": {"id": str(home / "model"), "dtype": "float32"},
            "compress": wanted,
            "distill": {"batch_size": 2},
            "calibration": {"dataset": text, "sequence_length": 16, "tokens": 256},
            "run": {"out": str(home / "out"), "device": "cpu", "compute": "float32"},
        }
    )


def kept(monkeypatch) -> dict[str, torch.Tensor]:
    """What a run finds, before it is dropped."""
    found: dict[str, torch.Tensor] = {}
    drop_work = RunDirectory.drop_work

    def keep(self):
        for path in sorted((self.path / "sensitivity").glob("*.safetensors")):
            found.update(self.tensors(f"sensitivity/{path.name}"))
        drop_work(self)

    monkeypatch.setattr(RunDirectory, "drop_work", keep)
    return found


def run_back(model, batches) -> int:
    """Gradients of the whole model at once, as measuring draws its tokens; how many they are."""
    tokens = 0
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(number)  # with seed 0
        logits = model(**batch).logits.flatten(0, -2)
        drawn = draw_tokens(logits, generator)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        tokens += len(drawn)
    return tokens


def kronecker(xs, gs, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """H and G as they are defined, from the inputs and gradients of every batch."""
    lengths = [g.square().sum(-1, keepdim=True) for g in gs]
    counts = torch.cat([length / (length + length.mean()) for length in lengths])
    x, g = torch.cat(xs).detach(), torch.cat(gs)
    return (x * counts).T @ x / counts.sum(), g.T @ g / tokens


def ridged(W, H, G) -> tuple[torch.Tensor, torch.Tensor]:
    """H and G with what initialisers add to them: shares of their mean eigenvalues, on the far side as W sees them."""
    small = W.shape[0] <= W.shape[1]
    of_inputs = (W @ H @ W.T).trace() / W.square().sum() if small else H.diagonal().mean()
    of_outputs = G.diagonal().mean() if small else (W.T @ G @ W).trace() / W.square().sum()
    return (
        H + init.INPUT_RIDGE * of_inputs * torch.eye(len(H), dtype=H.dtype),
        G + init.OUTPUT_RIDGE * of_outputs * torch.eye(len(G), dtype=G.dtype),
    )


@pytest.mark.parametrize("neurons", [None, 0.5])
def test_layer_by_layer_finds_what_the_whole_model_at_once_has(tmp_path, monkeypatch, neurons):
    given_recipe = recipe(tmp_path, neurons=neurons)
    found = kept(monkeypatch)
    run = pipeline.Run(prepare.prepare(given_recipe), Progress())
    batches = run.batches()
    run.execute()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval().requires_grad_(False)
    names = sorted(name.removesuffix(".spectrum") for name in found if name.endswith(".spectrum"))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def listen(name):
        def hook(_, args, out):
            seen[name].append(args[0].flatten(0, -2))
            out.register_hook(lambda gradient: seen[name].append(gradient.flatten(0, -2)))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(listen(name))
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_(True))
    tokens = run_back(model, batches)
    for name in names:
        W = model.get_submodule(name).weight
        H, G = kronecker(seen[name][::2], seen[name][1::2], tokens)
        small = W.shape[0] <= W.shape[1]
        for mine, exact in (
            (found[f"{name}.output"], G if small else W.T @ G @ W),
            (found[f"{name}.input"], W @ H @ W.T if small else H),
        ):
            assert torch.allclose(mine.double(), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
        H, G = ridged(W, H, G)
        total = float((G @ W @ H @ W.T).trace())
        assert float(found[f"{name}.spectrum"].sum()) == pytest.approx(total, rel=1e-3)


def padded_batches(run) -> list[dict[str, torch.Tensor]]:
    """A run's batches, the one drawn last with padding behind its first row, which no position reads or counts."""
    batches = [dict(batch) for batch in run.batches()]
    padded = batches[drawn_order(len(batches), 0)[-1]]
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, 9:] = 0
    return batches


@pytest.mark.parametrize(("build", "memory"), [(tiny, "auto"), (tiny, 0.0), (tiny_mixtral, "auto")])
def test_inputs_of_more_text_join_those_that_gradients_came_back_to(tmp_path, monkeypatch, build, memory):
    found = {}
    for tokens, more in ((64, 192), (64, None)):
        home = tmp_path / f"{tokens}-{more}"
        home.mkdir()
        with monkeypatch.context() as patch:
            kept_here = kept(patch)
            asked = recipe(home, build(), fisher_tokens=tokens, fisher_inputs=more)
            where = asked.run.model_copy(update={"stream_memory": memory})  # 0: in files
            run = pipeline.Run(prepare.prepare(asked.model_copy(update={"run": where})), Progress())
            given = padded_batches(run)
            patch.setattr(pipeline.Run, "batches", lambda self, given=given: given)
            run.execute()
        found[tokens, more] = kept_here
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "64-None" / "model").eval()
    names = ["self_attn.o_proj", *(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if build is tiny else [])]
    for name in (f"model.layers.1.{one}" for one in names):
        check_inputs(model, name, given, found)
    for key in found[64, None]:
        if key.endswith(".output"):
            assert torch.equal(found[64, None][key], found[64, 192][key]), "gradients are of the first tokens alone"


def check_inputs(model, name, given, found) -> None:
    """That inputs of 192 more tokens joined those of 64 in what was found of a weight."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    batches = [given[number] for number in drawn_order(len(given), 0)]
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    hook.remove()
    W = model.get_submodule(name).weight.double()
    first = sum(batch["input_ids"].numel() for batch in batches[:2])
    assert first == 64
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    rows = torch.cat([x[mask] for x, mask in zip(seen, masks)])
    behind = rows[64:].double() @ (W.T.detach() if W.shape[0] <= W.shape[1] else torch.eye(W.shape[1]).double())
    few, both = found[64, None][f"{name}.input"].double(), found[64, 192][f"{name}.input"].double()
    # both = (counted few + behind^T behind) / (counted + tokens behind): what was counted before is the one unknown.
    more = behind.T @ behind / len(behind)
    share = ((both - few) * (more - few)).sum() / (more - few).square().sum()
    assert 0 < share < 1
    assert torch.allclose(both, few + share * (more - few), rtol=1e-4, atol=1e-6 * float(both.abs().max()))
    counted = len(behind) * float(1 / share - 1)
    assert 0 < counted < first, "each of the first tokens counts for less than one"


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_no_map_of_the_rank_costs_less(shape):
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = shape
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    x, g = (torch.randn(200, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    x = x * torch.logspace(-0.4, 0.4, d_in, dtype=torch.float64)
    g = g * torch.logspace(-0.4, 0.4, d_out, dtype=torch.float64)
    H, G = x.T @ x / 200, g.T @ g / 200
    given_factors = (W @ H @ W.T, G) if d_out <= d_in else (H, W.T @ G @ W)
    A, B = init.fisher(W, 3, *given_factors)
    H, G = ridged(W, H, G)
    T, L = torch.linalg.cholesky(G).T, torch.linalg.cholesky(H)
    values = torch.linalg.svdvals(T @ W @ L)

    def cost(E):
        return float((T @ E @ L).square().sum())

    best = float(values[3:].square().sum())
    assert cost(W - A @ B) == pytest.approx(best, rel=1e-6), "Eckart-Young"
    whitened = init.whitened(W, 3, gram=H)
    assert cost(W - A @ B) < cost(W - whitened[0] @ whitened[1])
    spectrum = init.fisher_spectrum(W, *given_factors)
    assert len(spectrum) == min(shape)
    assert float(spectrum[3:].sum()) == pytest.approx(best, rel=1e-6)
    whole = init.fisher(W, min(shape), *given_factors)
    assert torch.allclose(whole[0] @ whole[1], W, atol=1e-10), "full rank is exact"


spectra = st.lists(st.floats(0, 100), min_size=8, max_size=8).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=60)
@given(
    found=st.lists(spectra, min_size=2, max_size=3),
    share=st.floats(0.05, 0.7),
    storage=st.sampled_from(["factors", "pivoted"]),
)
def test_ranks_fit_the_size_and_hardly_cost_more_than_the_best(found, share, storage):
    shapes = [(8, 8), (8, 16), (24, 8)]
    weights = [Weight(f"w{i}", shape) for i, (_, shape) in enumerate(zip(found, shapes))]
    compress = Compress(reduction=share, of="weights", rank_multiple=1, storage=storage)
    total = sum(w.parameters for w in weights)
    remove = -int(-share * total // 1)
    given_spectra = {w.name: values for w, values in zip(weights, found)}
    options = [allocate.choices(w, given_spectra[w.name], compress) for w in weights]
    possible = [c for c in itertools.product(*options) if sum(o.numbers for o in c) <= total - remove]
    if not possible:
        with pytest.raises(LillamaError):
            allocate.fisher([Layer("l", tuple(weights))], remove, compress, given_spectra)
        return
    ranks = allocate.fisher([Layer("l", tuple(weights))], remove, compress, given_spectra)
    chosen = [next(o for o in os if o.rank == ranks.get(w.name)) for w, os in zip(weights, options)]
    assert sum(o.numbers for o in chosen) <= total - remove
    best = min(sum(o.loss for o in c) for c in possible)
    # The hull is exact up to the last step: at most what one weight's whole step is worth.
    assert sum(o.loss for o in chosen) <= best + max(os[0].loss for os in options) + 1e-9
    for i, os in enumerate(options):  # nothing is left over that would have bought more
        spare = total - remove - sum(o.numbers for o in chosen)
        better = [o for o in os if 0 < o.numbers - chosen[i].numbers <= spare and o.loss < chosen[i].loss]
        assert not better


def test_a_run_chooses_its_ranks_keeps_to_the_size_and_goes_on_with_them(tmp_path, monkeypatch):
    wanted = recipe(tmp_path)
    provisional = prepare.make_plan(wanted)
    assert provisional.provisional and provisional.to_dict()["provisional"] is True
    distill = pipeline.distill

    def stop(job, watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distill", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(wanted)
    held = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert "provisional" not in held
    monkeypatch.setattr(pipeline, "distill", distill)
    monkeypatch.setattr(sensitivity._Measurement, "run", lambda self: pytest.fail("measured again"))
    result = pipeline.compress(wanted)
    assert {row["weight"]: row["rank"] for row in held["weights"] if row["rank"]} == result.plan.ranks
    assert len(set(result.plan.ranks.values())) > 1 and result.plan.reduction >= 0.3 * 0.5
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after
    assert not (tmp_path / "out" / "sensitivity").exists()
    again = pipeline.compress(wanted)
    assert again.plan == result.plan


MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "mamba"])
def test_every_decoder_can_be_measured(tmp_path, family):
    model = tiny(family) if family != "mamba" else AutoModelForCausalLM.from_config(MambaConfig(**MAMBA)).float()
    result = pipeline.compress(recipe(tmp_path, model))
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_a_decoder_that_listens_can_be_measured(tmp_path, monkeypatch, schedule):
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "model")
    folder(tmp_path / "speech", 4)
    result = pipeline.compress(
        Recipe.parse(
            {
                "model": {"id": str(tmp_path / "model"), "dtype": "float32"},
                "compress": {
                    "reduction": 0.4,
                    "of": "weights",
                    "rank_multiple": 2,
                    "strategy": "fisher",
                    "init": "fisher",
                    "storage": "pivoted",
                },
                "distill": {"batch_size": 2, "schedule": schedule},
                "calibration": {"dataset": str(tmp_path / "speech")},
                "run": {"out": str(tmp_path / "out"), "device": "cpu", "compute": "float32"},
            }
        )
    )
    assert result.plan.ranks and not result.plan.provisional
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(result.path)
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after


@pytest.mark.parametrize(
    ("init", "epochs", "limit"), [("fisher", 0, 0), ("svd", 0, 0), ("whitened", 0, 128), ("fisher", 1, None)]
)
def test_streams_carry_no_more_than_is_used(tmp_path, monkeypatch, init, epochs, limit):
    seen = []
    captured = Walk.capture_batches

    def capture(walk, raw, into, most=None, **how):
        seen.append((into.path.parent.parent.name, most))  # measuring has a folder of its own
        return captured(walk, raw, into, most, **how)

    monkeypatch.setattr(Walk, "capture_batches", capture)
    wanted = recipe(tmp_path, strategy="uniform", init=init, gram_tokens=128).model_dump()
    wanted["distill"] |= {"epochs": epochs, "schedule": "sequential"}
    assert pipeline.compress(Recipe.parse(wanted)).plan.ranks
    assert [most for parent, most in seen if parent != "sensitivity"] == [limit]


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # tied, and a head of its own
@pytest.mark.slow
def test_an_embedding_and_a_head_are_measured_as_by_the_whole_model_at_once(tmp_path, monkeypatch, family, schedule):
    wanted = recipe(tmp_path, tiny(family)).model_dump()
    wanted["plugin"], wanted["distill"]["schedule"] = "inkuba", schedule
    found = kept(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 60, (4, 32), generator=generator)} for _ in range(6)]
    result = pipeline.compress(Recipe.parse(wanted), batches=batches)
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval().requires_grad_(False)
    table, head = model.get_input_embeddings(), model.lm_head
    vectors, inputs, at_vectors, at_logits = [], [], [], []

    def looked_up(_, args, out):
        vectors.append(out.detach().flatten(0, -2))
        out.requires_grad_(True).register_hook(lambda gradient: at_vectors.append(gradient.flatten(0, -2)))

    def judged(_, args, out):
        inputs.append(args[0].detach().flatten(0, -2))
        out.register_hook(lambda gradient: at_logits.append(gradient.flatten(0, -2)))

    table.register_forward_hook(looked_up)
    head.register_forward_hook(judged)
    tokens = run_back(model, batches)

    H, G = kronecker(vectors, at_vectors, tokens)
    H = H + 0.1 * table.weight.T @ table.weight / len(table.weight)  # embedding_floor
    top, at_top = kronecker(inputs, at_logits, tokens)
    uncertain = float(torch.cat(at_logits).square().sum()) / tokens
    expected = {"model.embed_tokens.input": H, "model.embed_tokens.output": G}
    if family == "llama":
        expected["model.embed_tokens.output"] = G + uncertain * top
    else:
        expected |= {"lm_head.input": top, "lm_head.output": head.weight.T @ at_top @ head.weight}
    assert {name for name in found if not name.endswith("spectrum")} == set(expected)
    for name, exact in expected.items():
        assert torch.allclose(found[name].double(), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max())), name


@pytest.mark.parametrize("kind", ["linear", "embedding", "experts"])
def test_nothing_of_a_batch_is_kept(tmp_path, kind):
    if kind == "embedding":
        module, layer = torch.nn.Embedding(20, 8), Layer("e", (Weight("e", (20, 8), kind="embedding"),), "embedding")
    elif kind == "linear":
        module, layer = torch.nn.Sequential(torch.nn.Linear(8, 8)), Layer("m", (Weight("m.0", (8, 8)),))
    else:
        module, layer = torch.nn.Module(), Layer("m", (Weight("m.experts.up", (48, 32), 4, "experts"),))
        module.experts = tiny_mixtral().model.layers[0].mlp.experts
    listener = kfac.Listener(layer, module.requires_grad_(False), device.choose("cpu", "float32"))
    x = torch.arange(6) if kind == "embedding" else torch.randn(6, 8, requires_grad=True)
    if kind == "experts":
        x = torch.randn(6, 32, requires_grad=True)
        out = module.experts(x, torch.randint(0, 4, (6, 2)), torch.rand(6, 2))
    else:
        out = module(x)
    left = weakref.ref(out)
    out.sum().backward()
    del out
    gc.collect()
    assert left() is None
    assert listener.sums


def test_a_weight_that_is_never_called_stays_dense_and_is_named(caplog):
    model = tiny()
    model.model.layers[1].mlp.extra = torch.nn.Linear(32, 32)
    layer = Layer("model.layers.1", (Weight("model.layers.1.mlp.extra", (32, 32)),))
    listener = kfac.Listener(layer, model.get_submodule(layer.name), device.choose("cpu", "float32"))
    assert listener.close(1) == {}
    assert "model.layers.1.mlp.extra stays dense" in caplog.text and "never calls" in caplog.text
