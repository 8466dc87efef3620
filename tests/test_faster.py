"""What makes updates faster: the same is learned, and the model is as it was afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lillama.base.device import Device
from lillama.finetune import faster

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import families

HOST = torch.device("cpu")
ROUNDED, EXACT = Device(HOST, torch.bfloat16), Device(HOST, torch.float32)
IDS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def tied(name="llama"):
    model = families.MODELS[name]()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(faster, "_is_amd", lambda: True)


def test_plain_attention_predicts_the_same_and_goes_again(amd):
    model = tied()
    assert model.config._attn_implementation == "sdpa"
    expected = model(IDS).logits
    with faster.quick_attention(model, None, ROUNDED, 128):
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_fused_attention_stays_after_an_error_and_where_it_is_not_slow(amd, monkeypatch):
    model, seen = tied(), []
    with pytest.raises(ValueError, match="no"), faster.quick_attention(model, None, ROUNDED, 128):
        raise ValueError("no")
    seen.append(model.config._attn_implementation)
    for device, length in ((EXACT, 128), (ROUNDED, 4096), (Device(torch.device("cuda"), torch.bfloat16), 128)):
        with faster.quick_attention(model, None, device, length):
            seen.append(model.config._attn_implementation)
    monkeypatch.setattr(faster, "_is_amd", lambda: False)
    monkeypatch.setattr(faster, "_has_amx", lambda: False)
    with faster.quick_attention(model, None, ROUNDED, 128):
        seen.append(model.config._attn_implementation)
    assert set(seen) == {"sdpa"}


@pytest.mark.parametrize("is_amd, length, attending", [(True, 512, "ee"), (False, 256, "es"), (False, 257, "ss")])
def test_with_amx_the_learner_alone_attends_plainly_to_short_sequences(is_amd, length, attending, monkeypatch):
    monkeypatch.setattr(faster, "_is_amd", lambda: is_amd)
    monkeypatch.setattr(faster, "_has_amx", lambda: not is_amd)
    learner, teacher = tied(), tied()
    with faster.quick_attention(learner, teacher, ROUNDED, length):
        found = [one.config._attn_implementation[0] for one in (learner, teacher)]
    assert "".join(found) == attending


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_models_of_every_kind_of_attention_go_through(amd, name):
    model = families.MODELS[name]().eval()
    expected = model(IDS).logits
    with faster.quick_attention(model, None, ROUNDED, 128):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
