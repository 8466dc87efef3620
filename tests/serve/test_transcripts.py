"""vLLM transcribes with a compressed decoder as transformers does."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from models import linears
from servers import serving

import lillama

sys.path.append(str(Path(__file__).parents[1]))
import speech_models

RANKS = {
    "q_proj": ("pivoted", 24),
    "k_proj": ("factors", 16),
    "v_proj": ("pivoted", 24),
    "out_proj": ("factors", 24),
    "fc1": ("pivoted", 24),
    "fc2": ("factors", 32),
}
BITS = {
    "q_proj": ("pivoted:8:32", 24),
    "k_proj": ("factors:4:32", 16),
    "v_proj": ("dense:4:64", 64),
    "out_proj": ("factors:8:64", 24),
    "fc1": ("pivoted:4:32", 24),
    "fc2": ("dense:8:32", 64),
}
WIDTHS = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_target_positions": 64}
START = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
NEW = 16


def _save(directory: Path, ranks):
    """A speech model whose decoder is compressed, and its processor."""
    model = speech_models.whisper(speech_models.MULTILINGUAL, **WIDTHS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:
                parameter.normal_(std=0.25)
    modules = {name: how for name, how in linears(model, ranks).items() if ".decoder." in name}
    lillama.factorise_(model, modules)
    model.save_pretrained(directory)
    processor = speech_models.processor(speech_models.MULTILINGUAL)
    processor.save_pretrained(directory)
    return directory, processor


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("speech"), RANKS)


def _transformers(directory, processor, clip, start) -> list[int]:
    model = lillama.load(directory, dtype=torch.float32).eval()
    heard = processor.feature_extractor(clip, sampling_rate=speech_models.RATE, return_tensors="pt").input_features
    out = torch.tensor([start])
    with torch.no_grad():
        encoded = model.get_encoder()(heard)
        for _ in range(NEW):
            logits = model(encoder_outputs=encoded, decoder_input_ids=out).logits[0, -1]
            out = torch.cat([out, logits.argmax()[None, None]], 1)
    return out[0, len(start) :].tolist()


@pytest.mark.parametrize("ranks", [RANKS, BITS], ids=["full", "bits"])
def test_the_transcripts_are_those_of_transformers(ranks, tmp_path, engine):
    from vllm import SamplingParams

    directory, processor = _save(tmp_path, ranks)
    start = processor.tokenizer.convert_tokens_to_ids(START)
    clips = [speech_models.tone(1.0, pitch=200.0 + 90 * i) for i in range(4)]
    wanted = [_transformers(directory, processor, clip, start) for clip in clips]
    assert len({token for tokens in wanted for token in tokens}) > 5
    llm = engine(directory, max_num_seqs=8)
    prompts = [
        {
            "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (clip, speech_models.RATE)}},
            "decoder_prompt": {"prompt_token_ids": start},
        }
        for clip in clips
    ]
    outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outs] == wanted


def test_a_client_gets_a_transcript_of_a_file(speech, tmp_path):
    directory, processor = speech
    tokenizer = processor.tokenizer
    start = tokenizer.convert_tokens_to_ids(START)
    said = {}  # by pitch: what is said until the end of the text
    for pitch in range(200, 1400, 100):
        tokens = _transformers(directory, processor, speech_models.tone(1.0, pitch=float(pitch)), start)
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
        said[pitch] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    pitch = max(said, key=lambda one: (len(set(said[one].strip())), len(said[one])))
    assert len(set(said[pitch].strip())) > 1
    file = io.BytesIO()
    soundfile.write(
        file, speech_models.tone(1.0, pitch=float(pitch)), speech_models.RATE, format="WAV", subtype="FLOAT"
    )
    file.seek(0)
    with serving(directory, tmp_path / "log") as client:
        answer = client.audio.transcriptions.create(
            model="small",
            file=("clip.wav", file),
            language="en",
            temperature=0.0,
            extra_body={"max_completion_tokens": NEW},
        )
    assert answer.text.strip() == said[pitch].strip()
