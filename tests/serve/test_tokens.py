"""vLLM's greedy tokens are those of transformers."""

from __future__ import annotations

import gc

import pytest
from references import MODELS, NEW


def _served(engine, one, **options) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    llm = engine(one.directory, **options)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in one.prompts], greedy, use_tqdm=False)
    del llm
    gc.collect()
    return [list(out.outputs[0].token_ids) for out in outs]


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_transformers(name, made, engine):
    one = made[name]
    assert len({token for tokens in one.tokens for token in tokens}) > 20  # a model that repeats itself shows nothing
    assert _served(engine, one) == one.tokens


def test_a_compiled_model_says_the_same(made, engine):
    assert _served(engine, made["biases"], enforce_eager=False) == made["biases"].tokens
    assert _served(engine, made["experts-pivoted"], enforce_eager=False) == made["experts-pivoted"].tokens
    assert _served(engine, made["bits"], enforce_eager=False) == made["bits"].tokens
    assert _served(engine, made["narrow"], enforce_eager=False) == made["narrow"].tokens


@pytest.mark.parametrize("name, eager", [("mixed", True), ("bits", True), ("bits", False), ("bits-experts", True)])
def test_bfloat16_begins_as_float32_does(name, eager, made, engine):
    """Rounding changes which token is likeliest sooner or later: most first ones agree."""
    got = _served(engine, made[name], dtype="bfloat16", enforce_eager=eager)
    assert sum(a[0] == b[0] for a, b in zip(got, made[name].tokens)) >= 6


@pytest.mark.parametrize("name", ["biases", "shared", "tied-pivoted", "experts", "bits", "bits-experts"])
def test_two_processes_share_the_rows_and_columns(name, made, engine, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert _served(engine, made[name], tensor_parallel_size=2) == made[name].tokens


@pytest.mark.parametrize("name", ["biases", "fused", "embedding", "tied-pivoted", "shared", "bits", "narrow"])
def test_the_model_of_transformers_inside_vllm(name, made, engine):
    """Last: from here on the classes of transformers are vLLM's own."""
    assert _served(engine, made[name], model_impl="transformers") == made[name].tokens
