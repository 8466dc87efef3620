"""`compress.embedding`: the embedding and the head become layers around blocks that a plugin listed alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from conftest import tiny

from lillama import host
from lillama.base.progress import Progress
from lillama.checkpoint.load import load
from lillama.errors import LillamaError
from lillama.lowrank.embedding import LowRankEmbedding
from lillama.pretrained.ends import with_ends
from lillama.run import fingerprint, pipeline, prepare
from lillama.testing import full_rank_plan, recipe_for, token_batches

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def gemma():
    config = tf.Gemma3TextConfig(**SMALL, head_dim=8, num_key_value_heads=2, layer_types=["full_attention"] * 2)
    return tf.Gemma3ForCausalLM(config)


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))


def layers(model, plugin):
    return host.get().layers(model, None, plugin)[1]


@pytest.mark.parametrize("name", ["llama", "llama-bias"])  # tied, untied
def test_the_ends_of_a_decoder_are_those_that_its_own_plugin_lists(name):
    model = tiny(name)
    found, wanted = with_ends(model, layers(model, "decoder")), layers(model, "inkuba")
    assert [layer.name for layer in found] == [layer.name for layer in wanted]
    assert (found[0], found[-1]) == (wanted[0], wanted[-1])


def test_norms_around_the_blocks_are_passed_through():
    model = bloom()
    names = [layer.name for layer in with_ends(model, layers(model, "traced"))]
    assert names == [
        "transformer.word_embeddings",
        "transformer.word_embeddings_layernorm",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
        "lm_head",
    ]


@pytest.mark.parametrize("make", [gemma, bloom])
def test_a_run_leaves_exactly_the_planned_parameters_and_loads(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    changes = {"compress.embedding": True, "compress.reduction": 0.3, "compress.storage": "pivoted"}
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run", "traced", changes))
    embedding = prepared.layers[0].name
    assert {embedding, "lm_head"} <= prepared.plan.ranks.keys()
    result = pipeline.Run(prepared, Progress(), batches=token_batches(model, batches=6)).execute()
    loaded = load(result.path)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == result.plan.after
    low, table = loaded.get_submodule(embedding), model.get_submodule(embedding)
    assert isinstance(low, LowRankEmbedding)
    ids = torch.arange(64)
    # Scaled as the original is: a table without Gemma's scale would be 5.7 times too short.
    with torch.no_grad():
        assert 0.5 < float(low(ids).norm() / table(ids).norm()) < 1.1


@pytest.mark.parametrize("make", [gemma, bloom])
def test_full_rank_reproduces_the_logits(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    changes = {"compress.embedding": True, "distill.epochs": 0}
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run", "traced", changes))
    prepared.plan = full_rank_plan(prepared.layers, prepared.source.parameters, "factors")
    batches = token_batches(model, batches=6)
    loaded = load(pipeline.Run(prepared, Progress(), batches=batches).execute().path)
    with torch.no_grad():
        expected, found = model(**batches[0]).logits, loaded(**batches[0]).logits
    assert float((expected - found).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)), "does more between"),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                            decoder_start_token_id=0)
            ),
            "is run 0 times",
        ),
    ],
    ids=["positions are added", "an encoder and a decoder share it"],
)  # fmt: skip
def test_an_embedding_that_cannot_be_a_layer_is_refused_with_the_reason(make, reason, tmp_path):
    make().save_pretrained(tmp_path / "model")
    recipe = recipe_for(tmp_path / "model", tmp_path / "run", "traced", {"compress.embedding": True})
    with pytest.raises(LillamaError, match=reason) as caught:
        prepare.prepare(recipe)
    assert caught.value.where == "compress.embedding"


def test_a_run_of_an_earlier_version_goes_on_unless_the_embedding_is_asked_for_now():
    def of(**more):
        return {"recipe": {"calibration": {}, "finetune": None, "compress": {"reduction": 0.2, **more}}, "plugin": "p"}

    assert fingerprint.like(of(embedding=False), of(), "") == of()
    assert fingerprint.like(of(embedding=True), of(), "") != of()
