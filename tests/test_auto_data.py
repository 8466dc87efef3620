"""Calibration of models that no plugin knows and that eat no plain text: pairs of texts, images, sound."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import speech_models
import torch
import transformers as tf
from conftest import tokenizer
from lillama_auto.data import calibration_batches
from PIL import Image
from test_trace import t5, vit

import lillama
from lillama.base.progress import Progress
from lillama.errors import LillamaError
from lillama.recipe.schema import Recipe


def run(model, dataset, out, **calibration):
    recipe = {
        "model": {"id": str(model)},
        "compress": {"reduction": 0.1, "of": "weights", "rank_multiple": 2},
        "calibration": {"dataset": str(dataset)} | calibration,
        "distill": {"batch_size": 4},
        "run": {"out": str(out), "device": "cpu", "compute": "float32"},
    }
    return lillama.compress(Recipe.parse(recipe))


def test_a_folder_of_images(tmp_path):
    torch.manual_seed(0)
    vit().save_pretrained(tmp_path / "model")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    result = run(tmp_path / "model", tmp_path / "images", tmp_path / "out")
    loaded = lillama.load(result.path)
    assert type(loaded).__name__ == "ViTForImageClassification"
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after < result.plan.before


def test_data_without_images_is_refused_by_its_columns(tmp_path):
    torch.manual_seed(0)
    vit().save_pretrained(tmp_path / "model")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"words": "none"}\n' * 20)
    with pytest.raises(LillamaError, match="has no column of images; it has words"):
        run(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out")


@pytest.mark.slow
def test_an_encoder_decoder_reads_text_and_is_fed_what_it_writes(tmp_path):
    torch.manual_seed(0)
    words = tokenizer()
    model = t5()
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    text = "\n\n".join(["the cat sat on the mat and saw a dog"] * 60)
    (tmp_path / "text.txt").write_text(text)
    result = run(tmp_path / "model", tmp_path / "text.txt", tmp_path / "out", sequence_length=16)
    names = {name.split(".")[0] for name in result.plan.ranks}
    assert names == {"encoder", "decoder"}, "both halves become smaller"
    assert type(lillama.load(result.path)).__name__ == "T5ForConditionalGeneration"


def test_sound_goes_through_the_models_own_feature_extractor(tmp_path):
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    tf.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "model")
    tf.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path / "model")
    (tmp_path / "sound").mkdir()
    generator, lines = np.random.default_rng(0), []
    for number in range(12):
        soundfile.write(tmp_path / "sound" / f"{number}.wav", generator.normal(0, 0.1, 1600), 16000)
        lines.append(f'{{"audio": "{number}.wav", "text": null}}')
    (tmp_path / "sound" / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    result = run(tmp_path / "model", tmp_path / "sound", tmp_path / "out")
    assert type(lillama.load(result.path)).__name__ == "Wav2Vec2ForCTC"
    assert result.plan.after < result.plan.before


@pytest.mark.slow
def test_an_encoder_of_sound_and_its_decoder_learn_together(tmp_path):
    """The encoder hears tones, and the decoder is fed what the original writes for them, its first tokens included."""
    model = speech_models.whisper(speech_models.MULTILINGUAL)
    speech_models.save(tmp_path / "model", speech_models.MULTILINGUAL)
    speech_models.folder(tmp_path / "speech", clips=8)
    recipe = {
        "model": {"id": str(tmp_path / "model")},
        "plugin": "traced",
        "compress": {"reduction": 0.1, "of": "weights", "rank_multiple": 2},
        "calibration": {"dataset": str(tmp_path / "speech")},
        "distill": {"batch_size": 4, "loss": "teacher+student"},
        "run": {"out": str(tmp_path / "out"), "device": "cpu", "compute": "float32"},
    }
    parsed = Recipe.parse(recipe)
    batches = calibration_batches(model, parsed, Progress())
    for batch in batches:
        assert batch["input_features"].shape == (4, 8, 200)
        ids = batch["decoder_input_ids"]
        assert ids[0, 0] == model.config.decoder_start_token_id and ids.shape == batch["decoder_attention_mask"].shape
        assert ids.shape[1] > 3
    result = lillama.compress(parsed)
    halves = {name.split(".")[1] for name in result.plan.ranks}
    assert halves == {"encoder", "decoder"}
    loaded = lillama.load(result.path).eval()
    assert type(loaded).__name__ == "WhisperForConditionalGeneration"
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after < result.plan.before
    with torch.no_grad():
        given = {name: value[:2] for name, value in batches[0].items()}
        found, wanted = (one(**given).logits for one in (loaded, model))
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    assert (found - wanted).abs().mean() < 0.3 * wanted.abs().mean(), "a tenth fewer numbers, and much the same"
