"""The Whisper plugin: what becomes low-rank, what the decoder is fed, and a run from speech to checkpoint."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lillama_whisper import teacher as listening
from lillama_whisper.data import _heard, calibration_batches, finetune_examples, held_out
from lillama_whisper.teacher import Heard, loops
from lillama_whisper.tokens import IGNORED, Tokens, spoken
from safetensors import safe_open
from speech_models import ENGLISH, LETTERS, MULTILINGUAL, RATE, folder, manifest, processor, save, tone, whisper
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperConfig, pipeline

from lillama.base import cache
from lillama.base.progress import Progress
from lillama.data.audio import read_clips
from lillama.data.batches import fingerprint
from lillama.errors import LillamaError
from lillama.pretrained.calls import Capture
from lillama.recipe.schema import Recipe
from lillama.run import pipeline as runs
from lillama.run import prepare
from lillama.testing import check_architecture

RECIPE = Path(__file__).parents[1] / "recipes" / "whisper_decoder70.yaml"
MEDIUM_EN = WhisperConfig(
    d_model=1024,
    encoder_layers=24,
    decoder_layers=24,
    encoder_attention_heads=16,
    decoder_attention_heads=16,
    encoder_ffn_dim=4096,
    decoder_ffn_dim=4096,
    vocab_size=51864,
    num_mel_bins=80,
    max_source_positions=1500,
    max_target_positions=448,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))


PLAIN = {"strategy": "uniform", "storage": "factors"}


def speech_clips(directory):
    return read_clips(str(directory), split="train", rate=RATE, where="calibration")


def recipe(tmp_path, model, speech, *overrides, **changes) -> Recipe:
    settings = {
        "model": {"id": str(model), "dtype": "float32"},
        "compress": {"reduction": 0.5, "of": "weights", "rank_multiple": 2, "init": "svd", **PLAIN},
        "distill": {"batch_size": 2, "learning_rate": 1e-3, "holdout": 0.3},
        "calibration": {"dataset": str(speech)},
        "run": {"out": str(tmp_path / "run"), "device": "cpu", "compute": "float32"},
    }
    return Recipe.parse(settings | changes, overrides)


def test_medium_en_shrinks_as_in_the_paper():
    plan = prepare.make_plan(Recipe.load(RECIPE), MEDIUM_EN)
    assert plan.before == 763_856_896  # Table 16: 764 M; the encoder's fixed positions count, the tied head once
    assert 481e6 < plan.after < 486e6  # 485 M
    linears = sum(weight.parameters for weight in plan.weights.values())
    assert linears == 402_653_184
    assert plan.removed / linears == pytest.approx(0.70, abs=0.002)
    assert all(name.startswith("model.decoder.layers.") for name in plan.ranks)
    assert len(plan.ranks) == 24 * 10


def test_whisper_passes_the_contract(tmp_path):
    model = whisper()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        features = torch.randn(2, 8, 200, generator=generator)
        with torch.no_grad():
            states = model.get_encoder()(features).last_hidden_state[None]
        batches.append(
            {
                "encoder_outputs": states,
                "decoder_input_ids": torch.randint(0, len(LETTERS), (2, 7), generator=generator),
                "loss_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
            }
        )
    check_architecture(model, tmp_path, batches, plugin="whisper")


def test_the_key_projection_has_no_bias_and_shares_its_input_with_the_values():
    layers = prepare.prepare(Recipe.load(RECIPE), MEDIUM_EN).layers
    groups = {w.name.partition("layers.0.")[2]: w.group for w in layers[0].weights}
    assert groups["encoder_attn.k_proj"] == groups["encoder_attn.v_proj"]
    assert groups["encoder_attn.q_proj"] != groups["encoder_attn.k_proj"]
    assert groups["self_attn.q_proj"] == groups["self_attn.k_proj"] == groups["self_attn.v_proj"]


def ids(*tokens, special=ENGLISH):
    return [len(LETTERS) + special.index(token) for token in tokens]


def test_an_english_model_is_prompted_without_language():
    tokens = Tokens(whisper(), processor().tokenizer)
    start, silent, end = ids("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>")
    letters = processor().tokenizer(" hi", add_special_tokens=False)["input_ids"]
    assert tokens.sequence("hi", None) == [start, silent, *letters, end]
    assert tokens.labels(tokens.sequence("hi", None), None) == [IGNORED, *letters, end]
    assert processor().tokenizer("x").input_ids[:2] == [start, silent]  # as the model's own tokenizer has it


def test_a_multilingual_model_is_prompted_with_language_and_task():
    tokens = Tokens(whisper(MULTILINGUAL), processor(MULTILINGUAL).tokenizer)
    hausa, start, task, silent, end = ids(
        "<|ha|>",
        "<|startoftranscript|>",
        "<|transcribe|>",
        "<|notimestamps|>",
        "<|endoftext|>",
        special=MULTILINGUAL,
    )
    sequence = tokens.sequence("hi", hausa)
    assert sequence[:4] == [start, hausa, task, silent] and sequence[-1] == end
    labels = tokens.labels(sequence, hausa)
    assert len(labels) == len(sequence) - 1 and labels[:3] == [IGNORED] * 3 and labels[3:] == sequence[4:]


def test_a_transcript_never_outgrows_the_models_positions():
    tokens = Tokens(whisper(), processor().tokenizer)
    assert len(tokens.sequence("a" * 500, None)) == 40


def test_capitals_are_read_as_a_sentence():
    assert spoken("  HELLO   WORLD ") == "Hello world"
    assert spoken("Hello World") == "Hello World"


def test_every_clip_is_encoded_once_and_the_states_are_the_models_own(tmp_path, monkeypatch):
    model = save(tmp_path / "model")
    speech = folder(tmp_path / "speech", 5)
    heard = []
    hear = listening.Teacher.hear
    monkeypatch.setattr(listening.Teacher, "hear", lambda self, clips: heard.extend(clips) or hear(self, clips))
    settings = recipe(tmp_path, model, speech, "distill.schedule=concurrent", "distill.epochs=3")
    batches = list(calibration_batches(settings, Progress()))
    assert sorted(clip.name for clip in heard) == [f"{i}.flac" for i in range(5)]
    assert sorted(len(batch["decoder_input_ids"]) for batch in batches) == [1, 2, 2]
    original = AutoModelForSpeechSeq2Seq.from_pretrained(model)
    features = processor().feature_extractor([heard[0].samples], sampling_rate=16000, return_tensors="pt")
    given = {name: value[:, :1] for name, value in batches[0].items() if name == "encoder_outputs"}
    with torch.no_grad():
        mine = original(**given, decoder_input_ids=batches[0]["decoder_input_ids"][:1]).logits
        own = original(features.input_features, decoder_input_ids=batches[0]["decoder_input_ids"][:1]).logits
    torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_padding_does_not_count_and_the_end_is_not_read(tmp_path):
    speech = folder(tmp_path / "speech", 2)
    manifest(speech, [{"audio": "audio/0.flac", "text": "hi"}, {"audio": "audio/1.flac", "text": "hello"}])
    (batch,) = calibration_batches(recipe(tmp_path, save(tmp_path / "model"), speech), Progress())
    assert sorted(batch["loss_mask"].sum(1).tolist()) == [5, 8]  # two of the prompt, a space, the letters
    (end,) = ids("<|endoftext|>")
    assert not (batch["decoder_input_ids"][batch["loss_mask"] == 1] == end).any()


def test_clips_without_text_are_transcribed_once(tmp_path, monkeypatch):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 3, text=None)
    settings = recipe(tmp_path, model, speech)
    first = list(calibration_batches(settings, Progress()))
    monkeypatch.setattr(listening.Teacher, "_write", lambda *_: pytest.fail("transcribed again"))
    again = list(calibration_batches(settings, Progress()))
    assert fingerprint(first) == fingerprint(again)
    assert all(torch.equal(a["decoder_input_ids"], b["decoder_input_ids"]) for a, b in zip(first, again))


def test_clips_are_heard_beside_others_of_their_length(tmp_path):
    import soundfile

    speech = folder(tmp_path / "speech", 6, text=None)
    for i, seconds in enumerate((1.9, 0.3, 1.8, 0.2, 1.7, 0.4)):
        soundfile.write(speech / f"audio/{i}.flac", tone(seconds), RATE)
    groups = list(
        _heard(
            listening.Teacher(recipe(tmp_path, save(tmp_path / "model"), speech)), speech_clips(speech), 3, Progress()
        )
    )
    assert sorted(sorted(clip.name for clip in group.clips) for group in groups) == [
        ["0.flac", "2.flac", "4.flac"],
        ["1.flac", "3.flac", "5.flac"],
    ]


def test_whisper_s_own_rule_says_what_loops():
    assert loops("I am the one who is going to be " * 6)
    assert not loops("The quick brown fox jumps over the lazy dog, and nobody is surprised by it any more.")
    assert not loops("") and not loops("No, no, no.")


def test_how_many_clips_were_left_out_is_said_of_a_reading_that_ends_early(tmp_path, monkeypatch, caplog):
    speech = folder(tmp_path / "speech", 4, text=None)
    looping = iter([True])  # the first that is asked about
    monkeypatch.setattr("lillama_whisper.data.loops", lambda text: next(looping, False))
    teacher = listening.Teacher(recipe(tmp_path, save(tmp_path / "model"), speech))
    groups = _heard(teacher, speech_clips(speech), 2, Progress())
    with caplog.at_level("WARNING"):
        assert len(next(groups).clips) == 1
        groups.close()  # as whoever has read enough tokens does
    assert "left out 1 clips" in caplog.text


def test_clips_for_which_the_original_loops_are_left_out_and_copies_stay_with_their_clip(tmp_path, monkeypatch, caplog):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 4, text=None)
    digests = {clip.digest: clip.name for clip in speech_clips(speech)}
    looping = {"1.flac"}

    def hear(self, clips):
        heard = Heard(
            torch.zeros(len(clips), 5, 16), [digests.get(clip.digest, "copy") for clip in clips], [None] * len(clips)
        )
        _ = self.model
        return heard

    monkeypatch.setattr(listening.Teacher, "hear", hear)
    monkeypatch.setattr("lillama_whisper.data.loops", lambda text: text in looping)
    settings = recipe(tmp_path, model, speech, "finetune={augment: 1, batch_size: 2}")
    with caplog.at_level("WARNING"):
        examples = finetune_examples(settings, Progress())
    assert "left out 1 clips" in caplog.text
    assert sorted(digests[one["source"]] for one in examples) == [
        "0.flac",
        "0.flac",
        "2.flac",
        "2.flac",
        "3.flac",
        "3.flac",
    ]


@pytest.mark.parametrize("special", [ENGLISH, MULTILINGUAL])
def test_the_teachers_transcript_is_what_generate_writes(tmp_path, special):
    from transformers.modeling_outputs import BaseModelOutput

    model = save(tmp_path / "model", special)
    clips = list(read_clips(str(folder(tmp_path / "speech", 3, text=None)), split="train", rate=16000, where="x"))
    heard = listening.Teacher(recipe(tmp_path, model, "-")).hear(clips)
    original = AutoModelForSpeechSeq2Seq.from_pretrained(model)
    written = original.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=heard.states), max_new_tokens=30, do_sample=False
    )
    texts = AutoProcessor.from_pretrained(model).batch_decode(written, skip_special_tokens=True)
    assert [text[:20] for text in heard.texts] == [text.strip()[:20] for text in texts]
    assert all(heard.texts)


def test_variants_share_the_states_are_drawn_once_and_spare_the_clips_held_out(tmp_path, monkeypatch):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 6)
    settings = recipe(tmp_path, model, speech, "calibration.variants=2", "distill.holdout=0.2")
    plain = list(calibration_batches(recipe(tmp_path, model, speech), Progress()))
    batches = list(calibration_batches(settings, Progress()))
    assert len(batches) == 2 * 3 + 1  # two groups with two variants each, one without
    assert torch.equal(batches[-1]["encoder_outputs"], plain[-1]["encoder_outputs"])
    assert len({batch["encoder_outputs"].data_ptr() for batch in batches}) == 3
    assert len({tuple(batch["decoder_input_ids"].flatten().tolist()) for batch in batches}) == 1 + 2 * 2
    monkeypatch.setattr(listening.Teacher, "_write", lambda *_: pytest.fail("drawn again"))
    assert fingerprint(calibration_batches(settings, Progress())) == fingerprint(batches)


def test_altered_copies_are_transcribed_once_and_spare_the_clips_held_out(tmp_path, monkeypatch):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 6)
    settings = recipe(tmp_path, model, speech, "calibration.augment=2", "distill.holdout=0.2")
    plain = list(calibration_batches(recipe(tmp_path, model, speech), Progress()))
    batches = list(calibration_batches(settings, Progress()))
    assert len(batches) == 2 * 3 + 1  # two groups with two altered copies each, one without
    assert torch.equal(batches[-1]["encoder_outputs"], plain[-1]["encoder_outputs"])
    states = [batch["encoder_outputs"] for batch in batches]
    assert not any(torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])
    monkeypatch.setattr(listening.Teacher, "_write", lambda *_: pytest.fail("transcribed again"))
    assert fingerprint(calibration_batches(settings, Progress())) == fingerprint(batches)


@given(st.integers(1, 60), st.integers(0, 5), st.floats(0.0, 0.6))
def test_the_engine_holds_out_no_clip_that_has_variants(groups, variants, share):
    held = held_out(groups, variants, share)
    assert 0 <= held < groups or groups == 1
    total = (groups - held) * (1 + variants) + held
    engine = max(round(total * share), 1) if share and total > 1 else 0
    assert engine <= held or held == groups - 1


def test_bad_audio_stops_before_anything_is_written(tmp_path):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 4)
    (speech / "audio/2.flac").write_bytes(b"")
    with pytest.raises(LillamaError, match=r"1 of 4 clips: 2\.flac \(empty\)"):
        runs.compress(recipe(tmp_path, model, speech))
    assert not (tmp_path / "run").exists()


def test_large_states_live_in_a_file_that_leaves_no_trace():
    states = torch.randn(2, 5, 3)
    mapped = listening._mapped(states)
    assert torch.equal(mapped, states) and not list(cache.directory("states").iterdir())


def test_captured_calls_share_one_copy_of_the_states_and_let_go_of_it():
    model = whisper()
    layers = prepare.prepare(Recipe.load(RECIPE, ["compress.rank_multiple=1"]), model.config).layers
    capture = Capture(model, layers, torch.device("cpu"))
    states = torch.randn(1, 2, 100, 32)
    batch, _ = capture({"encoder_outputs": states, "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long)})
    held = [leaf for call in batch.calls for leaf in call.leaves if getattr(leaf, "shape", ()) == states.shape[1:]]
    assert len(held) == len(layers)
    assert len({tensor.data_ptr() for tensor in held}) == 1 and held[0].data_ptr() == states.data_ptr()
    gone = weakref.ref(held[0])
    del batch, held
    gc.collect()
    assert gone() is None, "the concurrent schedule captures every step: nothing may pile up"


@pytest.mark.parametrize("schedule", ["concurrent", "sequential"])
def test_a_run_leaves_the_encoder_as_it_was_and_a_recogniser(tmp_path, schedule):
    model, speech = save(tmp_path / "model"), folder(tmp_path / "speech", 4)
    evaluate = {"wer": {"dataset": str(speech), "new_tokens": 6, "speed_tokens": 4}}
    settings = recipe(tmp_path, model, speech, f"distill.schedule={schedule}", evaluate=evaluate)
    result = runs.compress(settings)
    assert result.metrics["before"]["wer/words"] == 4 and "wer/wer" in result.metrics["after"]
    with safe_open(model / "model.safetensors", "pt") as a, safe_open(result.path / "model.safetensors", "pt") as b:
        outside = [key for key in a.keys() if ".decoder.layers." not in key]  # noqa: SIM118
        assert any(".encoder." in key for key in outside)
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in outside)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(result.path)
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after
    reader = AutoProcessor.from_pretrained(result.path)
    recognise = pipeline(
        "automatic-speech-recognition",
        model=loaded,
        tokenizer=reader.tokenizer,
        feature_extractor=reader.feature_extractor,
    )
    assert isinstance(
        recognise({"raw": tone(0.5), "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 5})["text"], str
    )
    report = json.loads((tmp_path / "run" / "evaluation.after.json").read_text())
    assert report["details"]["wer"]["worst"][0]["reference"] == "hello"
