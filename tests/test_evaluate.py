"""Perplexity, speed, samples, and running them from a recipe."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from lillama import registry
from lillama.errors import LillamaError
from lillama.evaluate.context import Context, evaluate
from lillama.evaluate.perplexity import perplexity
from lillama.evaluate.sample import sample
from lillama.evaluate.speed import speed
from lillama.recipe.schema import Recipe

WORDS = [f"w{i}" for i in range(190)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and line ends, each a token, so that what was joined by what can be counted."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=16)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
        attention_dropout=0.5,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def context(tokenizer: PreTrainedTokenizerFast) -> Context:
    return Context(tokenizer, "cpu", where="evaluate.perplexity")


def write_text(path: Path, count: int = 300) -> Path:
    generator = torch.Generator().manual_seed(1)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator)]
    path.write_text("\n".join(" ".join(words[i : i + 7]) for i in range(0, count, 7)))
    return path


def reference_perplexity(model: Any, ids: list[int], length: int) -> tuple[float, int]:
    """Perplexity in float64 from the definition, window by window, all positions at once."""
    exact = copy.deepcopy(model).double().eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - length + 1, length):
            window = ids[start : start + length]
            probabilities = exact(torch.tensor([window])).logits[0].softmax(-1)
            losses += [-math.log(probabilities[i, window[i + 1]]) for i in range(length - 1)]
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(("length", "batch"), [(16, 1), (33, 4), (96, 2)])
def test_perplexity_is_that_of_the_definition(
    model: Any, context: Context, tmp_path: Path, length: int, batch: int
) -> None:
    path = write_text(tmp_path / "a.txt")
    ids = context.tokenizer(path.read_text(), verbose=False)["input_ids"]
    wanted, count = reference_perplexity(model, ids, length)
    model.train()
    result = perplexity(model, context, dataset=str(path), sequence_length=length, batch_size=batch)
    assert model.training, "left as it was found"
    model.eval()
    assert result["perplexity"] == pytest.approx(wanted, rel=1e-5)
    assert result["tokens"] == count == len(ids) // length * (length - 1)


def test_long_rows_of_logits_are_scored_in_slices_alike(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    path = str(write_text(tmp_path / "a.txt"))
    whole = perplexity(model, context, dataset=path, sequence_length=50)
    monkeypatch.setattr("lillama.evaluate.perplexity.POSITIONS", 7)
    assert perplexity(model, context, dataset=path, sequence_length=50) == pytest.approx(whole, rel=1e-6)


def test_windows_are_no_longer_than_the_model_or_the_text(model: Any, context: Context, tmp_path: Path) -> None:
    path = str(write_text(tmp_path / "a.txt"))
    assert perplexity(model, context, dataset=path) == perplexity(model, context, dataset=path, sequence_length=96)
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3 w4 w5")
    wanted, _ = reference_perplexity(model, context.tokenizer("w1 w2 w3 w4 w5")["input_ids"], 5)
    result = perplexity(model, context, dataset=str(short))
    assert result == {"perplexity": pytest.approx(wanted, rel=1e-5), "tokens": 4}
    short.write_text("w1")
    with pytest.raises(LillamaError, match="1 tokens, too few") as caught:
        perplexity(model, context, dataset=str(short))
    assert caught.value.where == "evaluate.perplexity.dataset"


def test_only_the_first_tokens_count_if_a_limit_is_set(model: Any, context: Context, tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", 20_000)
    ids = context.tokenizer(path.read_text(), verbose=False)["input_ids"]
    wanted, count = reference_perplexity(model, ids[:100], 16)
    for gap in (" ", " " * 50):  # the second needs more text for as many tokens
        path.write_text(path.read_text().replace(" ", gap))
        result = perplexity(model, context, dataset=str(path), sequence_length=16, tokens=100)
        assert result == {"perplexity": pytest.approx(wanted, rel=1e-5), "tokens": count}


def test_rows_are_joined_by_blank_lines_in_order_and_blank_ones_kept(
    model: Any, context: Context, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"text": ""}\n{"text": "w3"}\n')
    ids = context.tokenizer("w1 w2\n\n\n\nw3")["input_ids"]
    assert len(ids) == 7, "every line end is a token"
    wanted, count = reference_perplexity(model, ids, 7)
    assert perplexity(model, context, dataset=str(path)) == {
        "perplexity": pytest.approx(wanted, rel=1e-5),
        "tokens": count,
    }


def test_a_long_text_is_tokenised_without_complaints(
    model: Any, context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="transformers")  # whatever ran before
    context.tokenizer.deprecation_warnings = {}  # it warns once
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        perplexity(model, context, dataset=str(write_text(tmp_path / "a.txt")), sequence_length=64)
        assert not caplog.records
        context.tokenizer("w1 " * 20)
        assert "longer than" in caplog.text, "which would have been seen"
    finally:
        logger.removeHandler(caplog.handler)


def test_a_likelihood_that_is_not_finite_gives_inf(model: Any, context: Context, tmp_path: Path) -> None:
    path = str(write_text(tmp_path / "a.txt"))
    for value in (math.nan, 1e30):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.lm_head.weight[3:10] = value
        assert perplexity(broken, context, dataset=path)["perplexity"] == math.inf


def test_the_text_that_comes_with_python_has_a_perplexity(model: Any, context: Context) -> None:
    result = perplexity(
        model, context, dataset="package:pydoc_data.topics", split="train[80%:]", sequence_length=64, tokens=512
    )
    assert result["tokens"] == 8 * 63 and math.isfinite(result["perplexity"])


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=200, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
    )


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_speed_counts_the_tokens_that_were_timed(
    family: str, model: Any, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a clock that ticks once a forward pass, prefill takes one tick and every new token one more."""
    subject = model if family == "llama" else mamba()
    ticks = [0.0]
    handle = subject.register_forward_hook(lambda *_: ticks.__setitem__(0, ticks[0] + 1))
    monkeypatch.setattr("lillama.evaluate.speed.time.perf_counter", lambda: ticks[0])
    try:
        result = speed(subject, context, batch_size=2, prompt_tokens=10, new_tokens=5, repeats=2)
    finally:
        handle.remove()
    assert ticks[0] == 3 * 6, "a warm-up and two repeats, whatever the model would have ended with"
    assert result.pop("weight_bytes") == sum(p.numel() * 4 for p in subject.parameters()) + sum(
        b.numel() * 4 for b in subject.buffers()
    )
    assert result == {"prefill_tokens_per_second": 20.0, "decode_tokens_per_second": 2.0}


def test_speed_does_not_stop_at_the_end_of_a_sequence(context: Context, model: Any) -> None:
    ended = copy.deepcopy(model)
    ended.config.eos_token_id = ended.generation_config.eos_token_id = list(range(1, 200))
    result = speed(ended, context, prompt_tokens=4, new_tokens=6, repeats=1)
    assert all(0 < value < math.inf for value in result.values())


def test_speed_at_further_lengths_of_prompt(model: Any, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that runs out of memory is noted and the others still count; one beyond the positions is left out."""
    whole = model.generate

    def generate(ids: Any, **options: Any) -> Any:
        if ids.shape[1] == 30:
            raise torch.OutOfMemoryError("no memory left")
        return whole(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    result = speed(model, context, prompt_tokens=4, new_tokens=2, repeats=1, lengths=[20, 30, 40, 95])
    assert {name for name in result if name.startswith("prefill")} == {
        "prefill_tokens_per_second",
        "prefill_20_tokens_per_second",
        "prefill_40_tokens_per_second",
    }
    assert context.details == {"out_of_memory": [30]}


def test_speed_refuses_more_tokens_than_positions(model: Any, context: Context) -> None:
    with pytest.raises(LillamaError, match="96 positions"):
        speed(model, context, prompt_tokens=90, new_tokens=8)


def test_a_sample_is_the_greedy_completion_alone(model: Any, context: Context) -> None:
    ids = context.tokenizer("w5 w6")["input_ids"]
    wanted = list(ids)
    with torch.no_grad():
        while len(wanted) < len(ids) + 6 and wanted[-1] != 1:
            wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
    assert sample(model, context, prompt="w5 w6", new_tokens=6) == {}
    written = context.tokenizer.decode(wanted[len(ids) :], skip_special_tokens=True)
    assert written and context.details == {"prompt": "w5 w6", "completion": written}


def test_a_chat_sample_uses_the_template_if_there_is_one(model: Any, context: Context) -> None:
    sample(model, context, prompt="w5", new_tokens=4, chat=True)  # no template: as without
    plain = context.details["completion"]
    chat = copy.deepcopy(context.tokenizer)
    chat.chat_template = (
        "{% for m in messages %}w9 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
    )
    other = Context(chat, "cpu")
    sample(model, other, prompt="w5", new_tokens=4, chat=True)
    same = Context(context.tokenizer, "cpu")
    sample(model, same, prompt="w9 w5 w8", new_tokens=4)
    assert other.details == {"prompt": "w5", "completion": same.details["completion"]}
    assert other.details["completion"] != plain


def recipe(evaluators: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"id": "x"},
            "compress": {"reduction": 0.2},
            "calibration": {"dataset": "x.txt"},
            "run": {"out": "x"},
            "evaluate": evaluators,
        }
    )


def test_evaluators_run_in_order_and_their_results_are_labelled(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = str(write_text(tmp_path / "a.txt"))
    context = Context(tokenizer, "cpu")
    plan = recipe(
        {
            "perplexity/own": {"dataset": path, "sequence_length": 16},
            "sample": {"prompt": "w1", "new_tokens": 2},
            "perplexity": {"dataset": path, "sequence_length": 32},
            "sample/two": {"prompt": "w2", "new_tokens": 2},
        }
    )
    metrics = evaluate(model, plan.evaluate, context, {"plugin/score": 1.0})
    assert list(metrics) == [
        "plugin/score",
        "own/perplexity",
        "own/tokens",
        "perplexity/perplexity",
        "perplexity/tokens",
    ]
    assert metrics["own/perplexity"] != metrics["perplexity/perplexity"]
    assert {key: value["prompt"] for key, value in context.details.items() if "prompt" in value} == {
        "sample": "w1",
        "sample/two": "w2",
    }


def test_an_evaluator_gets_its_options_and_knows_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def count(model: Any, context: Context, *, steps: int, name: str = "none") -> dict[str, float]:
        seen.append((model, context.where, context.seed, steps, name))
        return {"steps": steps}

    monkeypatch.setitem(registry.EVALUATORS._targets, "count", count)
    metrics = evaluate("model", {"count/a": {"steps": 3}}, Context(None, "cpu", seed=4))
    assert metrics == {"a/steps": 3.0} and isinstance(metrics["a/steps"], float)
    assert seen == [("model", "evaluate.count/a", 4, 3, "none")]


def test_a_missing_file_is_reported_at_the_evaluators_key(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LillamaError) as caught:
        evaluate(model, {"perplexity/x": {"dataset": "./absent.txt"}}, Context(tokenizer, "cpu"))
    assert caught.value.where == "evaluate.perplexity/x.dataset"


@pytest.mark.parametrize("bad", [{"tokns": 3}, {"sequence_length": 1}, {"dataset": None}])
def test_options_that_do_not_fit_are_refused(bad: dict[str, Any]) -> None:
    schema = registry.EVALUATORS.options("perplexity")
    assert schema.model_validate({"dataset": "a.txt", "config": None, "tokens": 5})
    assert all(field.description for field in schema.model_fields.values())
    with pytest.raises(ValueError, match=next(iter(bad))):
        schema.model_validate({"dataset": "a.txt", **bad})
