"""Models that no plugin knows: what tracing finds, and that driving it is the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as tf

import lillama
from lillama.base.progress import Progress
from lillama.contract import Layer
from lillama.errors import LillamaError
from lillama.host import Host
from lillama.pretrained import examples, trace
from lillama.pretrained.forms import Leaf, Record, find_forms, pack, unpack
from lillama.run import pipeline, prepare
from lillama.testing import check_architecture, full_rank_plan, recipe_for

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))


def t5():
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def bart():
    config = tf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    return tf.BartForConditionalGeneration(config)


def vit():
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5))


def pairs(length=9):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, 60, (2, 12), generator=generator),
            "decoder_input_ids": torch.randint(3, 60, (2, length), generator=generator),
        }
        for _ in range(4)
    ]


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(4)]


def test_linears_are_grouped_by_the_input_they_share():
    model = tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8))
    layers = trace.trace(model)
    assert [layer.name for layer in layers] == ["transformer.h.0", "transformer.h.1"]
    groups: dict = {}
    for weight in layers[0].weights:
        groups.setdefault(weight.group, []).append(weight.name.removeprefix("transformer.h.0."))
    # Attention and the MLP read the same normalised input, side by side.
    assert [*groups.values()] == [
        ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"], ["attn.out_proj"], ["mlp.fc_out"]
    ]  # fmt: skip


def test_an_encoder_and_its_decoder_are_one_stream():
    names = [layer.name for layer in trace.trace(t5())]
    assert names == [
        "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm", "decoder.block.0", "decoder.block.1"
    ]  # fmt: skip


def test_a_deep_model_is_traced_in_a_copy_of_fewer_layers(monkeypatch):
    monkeypatch.setattr(examples, "SMALL", 0)
    config = tf.LlamaConfig(**SMALL | {"num_hidden_layers": 20, "num_key_value_heads": 2})
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    layers = trace.trace(model)
    assert len(layers) == 20 and all(len(layer.weights) == 7 for layer in layers)


def test_blocks_that_are_run_twice_are_refused_by_name():
    config = tf.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    with pytest.raises(LillamaError, match="AlbertForMaskedLM"):
        trace.trace(tf.AlbertForMaskedLM(config))


def test_the_plugin_of_any_model_is_asked_last():
    host = Host()
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2))
    assert host.layers(model, None)[0].name == "decoder"
    assert host.layers(bloom(), None)[0].name == "traced"


@pytest.mark.parametrize(
    "which", ["bloom", *(pytest.param(one, marks=pytest.mark.slow) for one in ("t5", "bart", "vit"))]
)
def test_the_contract(which, tmp_path):
    made = {"bloom": (bloom, None), "t5": (t5, pairs), "bart": (bart, lambda: pairs(12)), "vit": (vit, images)}[which]
    torch.manual_seed(0)
    model, batches = made[0](), made[1] and made[1]()
    check_architecture(model, tmp_path, batches, storages=["pivoted"])


def test_a_table_that_a_model_calls_its_output_embeddings_feeds_the_decoder(tmp_path):
    config = tf.FSMTConfig(
        langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.FSMTForConditionalGeneration(config).eval()
    assert model.get_output_embeddings() is model.model.decoder.embed_tokens
    model.save_pretrained(tmp_path / "model")
    changes = {"compress.init": "svd", "compress.storage": "factors", "distill.epochs": 0}
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run", "traced", changes))
    plan = full_rank_plan(prepared.layers, prepared.source.parameters, "factors")
    result = pipeline.Run(replace(prepared, plan=plan), Progress(), batches=pairs()).execute()
    loaded = lillama.load(result.path).eval()
    with torch.no_grad():
        found, wanted = (one(**pairs()[0]).logits for one in (loaded, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    changes = {"compress.strategy": "fisher", "compress.init": "fisher", "distill.loss": "teacher+student"}
    result = pipeline.compress(recipe_for(tmp_path / "model", tmp_path / "two", "traced", changes), batches=pairs())
    assert sum(p.numel() for p in lillama.load(result.path).parameters()) == result.plan.after < result.plan.before


def test_parts_of_a_stream_come_back_as_they_were():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)]
    again = unpack(pack(parts), [tuple(part.shape) for part in parts])
    assert all(torch.equal(*both) for both in zip(parts, again))
    narrow = [torch.randn(2, 5, 8, generator=generator), torch.randn(2, 3, 2, 4, generator=generator)]
    again = unpack(pack(narrow), [tuple(part.shape) for part in narrow])
    assert all(torch.equal(*both) for both in zip(narrow, again))
    turned = [part.transpose(0, 1) for part in parts]  # tokens first, as many as there are of each
    again = unpack(pack(turned), [tuple(part.shape) for part in turned])
    assert all(torch.equal(*both) for both in zip(turned, again))


def test_layers_with_something_between_them_are_refused():
    spec = torch.utils._pytree.tree_flatten(((torch.ones(1),), {}))[1]
    out = torch.utils._pytree.tree_flatten(torch.ones(1))[1]

    def leaf(value):
        return Leaf(value, (2, 3, 4), torch.float32)

    first = Record(Layer("one"), (leaf(b"a"),), spec, (leaf(b"b"),), out)
    second = Record(Layer("two"), (leaf(b"changed"),), spec, (leaf(b"c"),), out)
    with pytest.raises(LillamaError, match="does not reach") as error:
        find_forms([first, second])
    assert error.value.where == "two"


def test_what_depends_on_the_stream_beside_it_is_refused(tmp_path, monkeypatch):
    """A model whose blocks are given something that blocks before them computed, and did not return."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)).save_pretrained(tmp_path / "model")
    usual, seen = LlamaDecoderLayer.__call__, {}

    def call(self, hidden, *args, **kwargs):
        if self.self_attn.layer_idx:
            kwargs["beside"] = seen["mean"]
        out = usual(self, hidden, *args, **kwargs)
        seen["mean"] = out.mean()[None]
        return out

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
    prepared = prepare.prepare(recipe_for(tmp_path / "model", tmp_path / "run"))
    batch = {"input_ids": torch.randint(3, 60, (2, 12))}
    with pytest.raises(LillamaError, match="depends on what layers before it computed") as error:
        pipeline.Run(prepared, Progress(), batches=[batch] * 3).execute()
    assert error.value.where == "model.layers.1"
