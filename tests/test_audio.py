"""Audio in any container, rate and number of channels becomes the same clip; what cannot be read is named."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speech_models import RATE, folder, manifest, tone

from lillama.data.audio import Clip, decode, pieces, read_clips, require
from lillama.errors import LillamaError


def read(dataset, **options):
    return read_clips(str(dataset), split="train", rate=RATE, where="calibration", **options)


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 16000), ("flac", 44100), ("mp3", 22050), ("ogg", 48000)])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_container_rate_and_channels_give_the_same_sound(tmp_path, suffix, rate, channels):
    sound = tone(1.0, rate)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([sound] * channels, axis=1), rate)
    samples = decode(path.read_bytes(), RATE)
    wanted = tone(1.0)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - len(wanted)) <= RATE // 10  # MP3 pads
    spectrum = np.abs(np.fft.rfft(samples[: RATE // 2 * 2]))
    assert abs(int(spectrum.argmax()) * RATE / (RATE // 2 * 2) - 440) < 5
    assert np.sqrt(np.square(samples).mean()) == pytest.approx(np.sqrt(np.square(wanted).mean()), rel=0.1)


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = tone(0.2), np.zeros_like(tone(0.2))
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(decode((tmp_path / "a.wav").read_bytes(), RATE), left / 2, atol=1e-6)


def test_a_folder_gives_clips_with_texts_relative_to_the_manifest(tmp_path):
    clips = list(read(folder(tmp_path / "speech"), config="clean"))  # a hub's config does not trouble a folder
    assert [clip.name for clip in clips] == [f"{i}.flac" for i in range(6)]
    assert {clip.text for clip in clips} == {"hello"}
    assert clips[2].seconds == pytest.approx(0.7, abs=0.01)


def test_null_and_blank_texts_are_none(tmp_path):
    directory = folder(tmp_path / "speech", 2)
    manifest(directory, [{"audio": "audio/0.flac", "text": None}, {"audio": "audio/1.flac", "text": "  "}])
    assert [clip.text for clip in read(directory)] == [None, None]


def test_a_seed_shuffles_and_a_fraction_keeps_a_share(tmp_path):
    directory = folder(tmp_path / "speech")
    half = [clip.name for clip in read(directory, fraction=0.5, seed=3)]
    assert len(half) == 3
    assert half == [clip.name for clip in read(directory, fraction=0.5, seed=3)]
    everything = [clip.name for clip in read(directory, seed=3)]
    assert everything[:3] == half and everything != sorted(everything)


def test_bad_audio_is_skipped_and_named_with_a_count(tmp_path, caplog):
    directory = folder(tmp_path / "speech", 20)
    (directory / "audio/3.flac").write_bytes(b"not audio")
    soundfile.write(directory / "audio/4.flac", np.zeros(0, np.float32), RATE)
    with caplog.at_level(logging.WARNING):
        clips = list(read(directory))
    assert len(clips) == 18
    assert "2 of 20 clips" in caplog.text and "3.flac (unreadable" in caplog.text and "4.flac (empty)" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "silent", "broken"])
def test_too_much_bad_audio_stops(tmp_path, kind):
    directory = folder(tmp_path / "speech", 9)
    victim = directory / "audio/0.flac"
    if kind == "missing":
        victim.unlink()
    elif kind == "silent":
        soundfile.write(victim, np.zeros(RATE, np.float32), RATE)
    else:
        victim.write_bytes(victim.read_bytes()[:40])
    with pytest.raises(LillamaError, match=r"calibration.dataset: too much of the audio.*1 of 9 clips: 0\.flac"):
        list(read(directory))


def test_data_without_audio_says_what_a_folder_needs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no sound"}\n')
    with pytest.raises(LillamaError, match="no column of audio") as caught:
        read(tmp_path / "a.jsonl")
    assert "manifest.jsonl" in str(caught.value) and "text" in str(caught.value)


def test_an_unknown_column_lists_those_there_are(tmp_path):
    with pytest.raises(LillamaError, match=r"calibration\.column: there is no column 'words'") as caught:
        read(folder(tmp_path / "speech", 1), column="words")
    assert "audio, text" in str(caught.value)


def test_a_missing_package_names_the_extra():
    with pytest.raises(LillamaError, match=r"evaluate\.wer: .*'no_such_package'") as caught:
        require("soundfile", "no_such_package", where="evaluate.wer")
    assert "lillama[speech]" in str(caught.value)


@given(st.integers(1, 6000), st.floats(0.02, 0.2))
def test_pieces_are_short_enough_and_joined_give_the_clip_back(length, seconds):
    rate = 1000
    sound = np.random.default_rng(length).normal(size=length).astype(np.float32)
    parts = pieces(Clip("a", sound, rate, "text"), seconds)
    assert all(len(part.samples) <= int(seconds * rate) for part in parts)
    assert np.array_equal(np.concatenate([part.samples for part in parts]), sound)
    assert (parts[0].text == "text") == (len(parts) == 1)


def test_a_long_clip_is_cut_where_it_is_quiet():
    sound = np.ones(RATE * 3, np.float32)
    sound[int(1.85 * RATE) : int(1.95 * RATE)] = 0
    first, *_ = pieces(Clip("a", sound, RATE, None), 2.0)
    assert first.seconds == pytest.approx(1.9, abs=0.01)
