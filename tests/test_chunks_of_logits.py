"""Logits made a few positions at a time are those of all at once, and so are losses and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SMALL, tiny
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, MambaConfig

from lillama.base.progress import Progress
from lillama.errors import LillamaError
from lillama.evaluate import perplexity
from lillama.finetune import loss
from lillama.finetune.data import IGNORED
from lillama.pretrained import predictions
from lillama.pretrained.learn import learn_forms
from lillama.pretrained.walk import Walk
from lillama.run import prepare
from lillama.testing import recipe_for

CONFIGS = {
    "gemma2": Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def model_of(name: str, seed: int = 0):
    if name == "llama":
        return tiny(seed=seed)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).float().eval()


@pytest.fixture
def few(monkeypatch):
    """Three positions of two sequences at a time."""
    monkeypatch.setattr(predictions, "LOGITS", 2 * 3 * 97)
    monkeypatch.setattr(predictions, "READ", 2 * 3 * 97)


@pytest.fixture
def counted(monkeypatch):
    """The positions of all logits that a head of `model` made."""
    seen: list[int] = []

    def watch(model):
        model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
        return seen

    return watch


IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", *CONFIGS])
def test_logits_in_chunks_are_those_of_all_at_once(name, few, counted):
    model = model_of(name)
    whole = model(input_ids=IDS).logits
    seen = counted(model)
    with torch.no_grad():
        chunks = list(predictions.in_chunks(model, {"input_ids": IDS}, range(1, 10)))
    assert [at for at, _ in chunks] == [range(1, 4), range(4, 7), range(7, 10)]
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks], 1), whole[:, 1:10], rtol=1e-6, atol=1e-6)
    assert seen == [3, 3, 3], "no more logits than asked for were made"
    inside = next(m for m in model.base_model.children() if isinstance(m, torch.nn.ModuleList))
    runs = []
    inside[0].register_forward_hook(lambda *_: runs.append(1))
    list(predictions.in_chunks(model, {"input_ids": IDS}))
    assert len(runs) == 1, "the body ran once"
    assert "forward" not in model.base_model.__dict__
    torch.testing.assert_close(model(input_ids=IDS).logits, whole)


def test_a_model_that_gives_all_logits_or_none_gives_all(few):
    model = tiny()
    whole = model(input_ids=IDS).logits

    class Own(type(model)):
        def forward(self, input_ids, use_cache=False):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model.__class__ = Own
    ((at, logits),) = predictions.in_chunks(model, {"input_ids": IDS}, range(2, 5))
    assert at == range(2, 5)
    torch.testing.assert_close(logits, whole[:, 2:5])


def test_perplexity_in_chunks_is_that_of_all_at_once(few, counted, monkeypatch):
    model = tiny()
    seen = counted(model)
    windows = perplexity.Windows(IDS, (1, 2))
    some = perplexity.score(model, windows, 2, "cpu")
    assert max(seen) == 3 and some["tokens"] == 2 * 9
    monkeypatch.setattr(predictions, "READ", 1 << 26)
    assert perplexity.score(model, windows, 2, "cpu") == pytest.approx(some, rel=1e-6)
    assert seen[-1] == 11


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_loss_of_fine_tuning_in_chunks_has_the_gradient_of_all_at_once(name, share, monkeypatch):
    labels = IDS.clone()
    labels[0, :5] = IGNORED
    inputs = {"input_ids": IDS, "labels": labels}
    found = []
    for at_once in (3, 100):
        monkeypatch.setattr(predictions, "LOGITS", 2 * at_once * 97)
        model, teacher = model_of(name), model_of(name, seed=1)  # Llama's and Gemma's heads are tied
        model.get_input_embeddings().weight.requires_grad_(True)
        model.base_model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        value, _ = loss.loss_of(model, teacher, inputs, share, True, items=7)
        (value * 3).backward()
        found.append((value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        with torch.no_grad():
            again, _ = loss.loss_of(model, teacher, inputs, share, True, items=7)
        torch.testing.assert_close(again, value)
    (some, gradients), (whole, wanted) = found
    torch.testing.assert_close(some, whole)
    assert gradients.keys() == wanted.keys() and "model.embed_tokens.weight" in wanted
    assert "model.layers.0.mlp.up_proj.weight" not in wanted
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6)


def test_fine_tuning_makes_few_logits_at_a_time(few, counted):
    model = tiny()
    seen = counted(model)
    value, outputs = loss.loss_of(model, model, {"input_ids": IDS, "labels": IDS}, 0.5, True)
    value.backward()
    assert max(seen) == 3 and outputs == {}


@pytest.mark.parametrize("masked", [False, True])
def test_the_drawn_tokens_loss_runs_back_in_chunks(masked):
    model = tiny()
    hidden = model.model(input_ids=IDS).last_hidden_state.detach()
    mask = torch.ones_like(IDS)
    mask[1, 2:] = 0
    gradients = []
    for at_once in (4, None):
        leaf = hidden.clone().requires_grad_()
        asked = []

        def run(keep, leaf=leaf, asked=asked):
            asked.append(keep)
            # Certain predictions: the same tokens are drawn however many are drawn at a time.
            logits = 1e4 * model.lm_head(leaf if keep is None else leaf[:, keep])
            return predictions.Predicted(logits, classes=True)

        generator = torch.Generator().manual_seed(0)
        tokens = predictions.backward_in_chunks(run, leaf, mask if masked else None, generator, at_once)
        assert tokens == (13 if masked else 22)
        assert [None if keep is None else len(keep) for keep in asked] == ([4, 4, 3] if at_once else [None])
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_how_layers_are_driven_is_learned_from_few_logits(few, tmp_path, monkeypatch):
    """Of 262 k words, the logits of two whole rows took 5.5 GiB, in float32, twice and their difference."""
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run"))
    prepared.source.fetch(tmp_path)
    made = []
    prepared.source.model.lm_head.register_forward_hook(lambda _, args, out: made.append(out.shape[1]))
    walk = Walk(prepared.source, prepared.layers, prepared.layers, prepared.device, Progress())
    learn_forms(walk, {"input_ids": IDS})
    assert made == [3, 3]
    spoilt = prepared.source.model.model.norm.register_forward_hook(lambda _, args, out: out + len(made))
    with pytest.raises(LillamaError, match="depend on more than what the last layer returns"):
        learn_forms(walk, {"input_ids": IDS})
    spoilt.remove()
