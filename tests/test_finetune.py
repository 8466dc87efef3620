"""Fine-tuning after compression: factors stay factors, the encoder stays as it is, a stopped run goes on."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from conftest import tiny
from conftest import tokenizer as word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from speech_models import folder, save
from torch.nn import functional as F

from lillama.base.device import Device
from lillama.base.progress import Progress
from lillama.base.rundir import RunDirectory
from lillama.checkpoint.load import load
from lillama.errors import LillamaError
from lillama.finetune import adapters, average, data, loss, resume, trainer
from lillama.finetune import train as finetune
from lillama.finetune.divided import learned_of
from lillama.finetune.settings import differing
from lillama.lowrank.swap import is_factorised
from lillama.recipe.schema import Finetune, Lora, Recipe
from lillama.run import pipeline

IGNORED = data.IGNORED
PLAIN = {"strategy": "uniform", "storage": "factors"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path / "cache"))


def speech_recipe(tmp_path, **section) -> Recipe:
    model, speech = tmp_path / "model", tmp_path / "speech"
    if not model.exists():
        save(model)
        folder(speech, 6)
    return Recipe.parse(
        {
            "model": {"id": str(model), "dtype": "float32"},
            "compress": {"reduction": 0.4, "of": "weights", "rank_multiple": 2, "init": "svd", **PLAIN},
            "distill": {"batch_size": 2, "epochs": 1},
            "calibration": {"dataset": str(speech)},
            "finetune": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checks": 2, **section},
            "evaluate": {"wer": {"dataset": str(speech), "new_tokens": 4, "speed_tokens": 0}},
            "run": {"out": str(tmp_path / "run"), "device": "cpu", "compute": "float32"},
        }
    )


def tensors(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_speech_is_finetuned_with_the_encoder_frozen_and_the_factors_kept(tmp_path):
    result = pipeline.compress(speech_recipe(tmp_path))
    assert set(result.metrics) >= {"before", "after", "finetuned"}
    assert result.metrics["finetuned"].keys() == result.metrics["before"].keys()
    assert result.path == tmp_path / "run" / "finetuned"
    compressed, tuned = tensors(tmp_path / "run" / "model"), tensors(result.path)
    assert compressed.keys() == tuned.keys()
    changed = {key for key in tuned if not torch.equal(tuned[key], compressed[key])}
    assert changed and not any(".encoder." in key for key in changed)
    assert any(key.endswith(".A") for key in changed) and any(key.endswith(".B") for key in changed)
    import lillama

    loaded = lillama.load(result.path)
    assert sum(is_factorised(module) for module in loaded.modules()) == len(result.plan.ranks)
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.after
    assert (result.path / "tokenizer.json").is_file() and (result.path / "generation_config.json").is_file()
    assert not (tmp_path / "run" / "finetune").exists(), "the trainer's own files are not left behind"


@pytest.mark.slow
def test_a_finished_finetuning_is_not_done_again_and_other_settings_are_refused(tmp_path, monkeypatch):
    pipeline.compress(speech_recipe(tmp_path))
    monkeypatch.setattr(finetune, "finetune", lambda *_: pytest.fail("trained again"))
    pipeline.compress(speech_recipe(tmp_path))
    with pytest.raises(LillamaError, match=r"finetune\.learning_rate: .*another learning_rate"):
        pipeline.compress(speech_recipe(tmp_path, learning_rate=1e-4))


def test_finetuning_can_be_added_to_a_finished_run(tmp_path):
    settings = speech_recipe(tmp_path)
    first = pipeline.compress(settings.model_copy(update={"finetune": None}))
    assert "finetuned" not in first.metrics and first.path.name == "model"
    assert "finetuned" in pipeline.compress(settings).metrics


def test_vectors_learn_at_a_rate_of_their_own(tmp_path):
    settings = speech_recipe(tmp_path, learning_rate=1e-12, vector_learning_rate=1e-2)
    tuned = tensors(pipeline.compress(settings).path)
    compressed = tensors(tmp_path / "run" / "model")
    moved = {key: (tuned[key] - compressed[key]).abs().max().item() for key in tuned if tuned[key].numel()}
    assert max(size for key, size in moved.items() if tuned[key].dim() >= 2) < 1e-6
    norms = [size for key, size in moved.items() if "decoder" in key and "norm" in key]
    assert norms and min(norms) > 1e-3


@pytest.mark.parametrize(
    "section", [{"average": 0.3}, pytest.param({"vector_learning_rate": 1e-2}, marks=pytest.mark.slow)]
)
def test_a_stopped_finetuning_goes_on_to_the_same_end(tmp_path, monkeypatch, section):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = tensors(pipeline.compress(speech_recipe(tmp_path / "a", **section)).path)
    settings = speech_recipe(tmp_path / "b", **section)
    loss_of, calls = loss.loss_of, []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:  # two updates and a check are done
            raise KeyboardInterrupt
        return loss_of(*arguments, **options)

    monkeypatch.setattr(trainer, "loss_of", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(settings)
    assert resume.last_checkpoint(tmp_path / "b/run/finetune", settings.finetune).name == "checkpoint-2"
    calls.clear()
    calls.extend([1] * 9)
    resumed = tensors(pipeline.compress(settings).path)
    assert len(calls) - 9 < 6, "it must not start from the beginning"
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["weights", "adapters"])
def test_an_anchor_goes_back_by_its_share(tmp_path, lora):
    """Everything learned is three quarters of the way that it would have gone, in what is stored as it learns."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    common = {"compress": {"storage": "factors"}, "steps": 4, "lora": lora}
    far = load(pipeline.compress(text_recipe(tmp_path / "a", **common)).path).state_dict()
    near = load(pipeline.compress(text_recipe(tmp_path / "b", anchor=0.25, **common)).path).state_dict()
    began = load(tmp_path / "a" / "run" / "model").state_dict()
    assert any(not torch.equal(far[name], began[name]) for name in far)
    for name, state in near.items():
        torch.testing.assert_close(state, far[name].lerp(began[name], 0.25), rtol=1e-5, atol=1e-6)


def test_hours_limit_the_speech(tmp_path):
    from lillama_whisper.data import finetune_examples

    from lillama.base.progress import Progress

    assert len(finetune_examples(speech_recipe(tmp_path), Progress())) == 6
    assert len(finetune_examples(speech_recipe(tmp_path, hours=1 / 3600), Progress())) == 2


def test_a_loss_that_is_not_finite_is_never_stored(tmp_path):
    with pytest.raises(LillamaError, match="finetune: the loss became nan"):
        pipeline.compress(speech_recipe(tmp_path, learning_rate=1e30, clip_norm=1e30, warmup=0.0))
    assert not (tmp_path / "run" / "finetuned").exists()


def text_recipe(tmp_path, compress=None, **section) -> Recipe:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran\n" * 200)
    return Recipe.parse(
        {
            "model": {"id": str(tmp_path / "model"), "dtype": "float32"},
            "compress": {"reduction": 0.2, "rank_multiple": 2, "init": "svd", **PLAIN, **(compress or {})},
            "distill": {"batch_size": 4},
            "calibration": {"dataset": str(tmp_path / "text.txt"), "sequence_length": 16},
            "finetune": {"sequence_length": 16, "steps": 20, "learning_rate": 1e-2, "checks": 2, **section},
            "evaluate": {"perplexity": {"dataset": str(tmp_path / "text.txt"), "sequence_length": 16}},
            "run": {"out": str(tmp_path / "run"), "device": "cpu", "compute": "float32"},
        }
    )


def test_text_is_finetuned_too_and_learns(tmp_path):
    metrics = pipeline.compress(text_recipe(tmp_path)).metrics
    assert metrics["finetuned"]["perplexity/perplexity"] < 0.5 * metrics["after"]["perplexity/perplexity"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    held = [event["held_out_loss"] for event in events if event.get("finetune")]
    assert len(held) == 2 and held[1] < held[0]


@pytest.mark.parametrize("holdout", [0.05, 0.0])
def test_the_mean_of_the_states_is_kept_and_judged(tmp_path, monkeypatch, holdout):
    """Of four updates the last three count; what is stored is their mean, of every weight that learns."""
    seen = []
    add = average.Average.add

    def noted(self, update):
        seen.append([tensor.clone() for tensor in self.own])
        add(self, update)

    monkeypatch.setattr(average.Average, "add", noted)
    settings = text_recipe(tmp_path, compress={"storage": "factors"}, steps=4, average=0.25, holdout=holdout, checks=1)
    learned = {}
    build = finetune.build_trainer

    def built(learner, *rest):
        learned.update(learned_of(learner))
        return build(learner, *rest)

    monkeypatch.setattr(finetune, "build_trainer", built)
    place = pipeline.compress(settings).path
    assert len(seen) == 4
    stored = load(place).state_dict()
    for number, name in enumerate(learned):
        mean = torch.stack([state[number] for state in seen[1:]]).mean(0)
        torch.testing.assert_close(stored[name], mean, rtol=1e-5, atol=1e-6)
        assert not torch.equal(stored[name], seen[-1][number])


def test_settings_that_an_earlier_version_did_not_know_are_null():
    known = Finetune().model_dump(mode="json")
    earlier = {key: value for key, value in known.items() if key != "average"}
    assert differing(earlier, known) == []
    assert differing(earlier, known | {"average": 0.5}) == ["average"]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_adapters_learn_and_are_merged(tmp_path, storage):
    pytest.importorskip("peft")
    compress = {"storage": storage, "init": "whitened", "skip": ["*.v_proj"]}
    lora = {"rank": 4, "alpha": 8}
    result = pipeline.compress(text_recipe(tmp_path, compress, lora=lora, learning_rate=3e-2))
    metrics = result.metrics
    assert metrics["finetuned"]["perplexity/perplexity"] < 0.8 * metrics["after"]["perplexity/perplexity"]
    compressed, tuned = tensors(tmp_path / "run" / "model"), tensors(result.path)
    assert compressed.keys() == tuned.keys(), "nothing of the adapters is left"
    changed = {key for key in tuned if not torch.equal(tuned[key], compressed[key])}
    matrices = {f"{name}.{factor}" for name in result.plan.ranks for factor in ("AB" if storage == "factors" else "BC")}
    dense = {key for key in tuned if key.endswith("v_proj.weight")}
    assert changed - {key for key in changed if key.endswith("pivots")} == matrices | dense


@pytest.mark.slow
def test_a_stopped_lora_goes_on_to_the_same_end(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = pipeline.compress(text_recipe(tmp_path / "a", lora={"on": "factors"}))
    stopped = text_recipe(tmp_path / "b", lora={"on": "factors"})

    def stop(trainer, *args, **kwargs):
        if trainer.state.global_step >= 12:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    step = transformers.Trainer.training_step
    monkeypatch.setattr(transformers.Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(stopped)
    monkeypatch.undo()
    assert resume.last_checkpoint(tmp_path / "b" / "run" / "finetune", stopped.finetune).name == "checkpoint-10"
    again = pipeline.compress(stopped)
    one, two = tensors(whole.path), tensors(again.path)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_lora_without_peft_or_without_targets_says_so(tiny_llama, monkeypatch):
    with pytest.raises(LillamaError, match=r"finetune\.lora\.on: nothing that may learn can be adapted: factors"):
        adapters.attach(tiny_llama, Lora(on="factors"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LillamaError, match="peft is not installed"):
        adapters.attach(tiny_llama, Lora())


def test_the_loss_is_the_models_own_cross_entropy_and_the_teachers_at_its_share():
    model, teacher = tiny(seed=0), tiny(seed=1)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = IGNORED
    inputs = {"input_ids": ids, "labels": labels}
    own, _ = loss.loss_of(model, None, inputs, 0.0, True)
    torch.testing.assert_close(own, model(input_ids=ids, labels=labels).loss)
    taught, _ = loss.loss_of(model, teacher, inputs, 1.0, True)
    counts = labels[:, 1:] != IGNORED
    p, q = (m(input_ids=ids).logits[:, :-1][counts].log_softmax(-1) for m in (teacher, model))
    torch.testing.assert_close(taught, F.kl_div(q, p, log_target=True, reduction="batchmean"))
    same, _ = loss.loss_of(model, model, inputs, 1.0, True)
    assert abs(float(same)) < 1e-6


def test_examples_may_have_shares_of_their_own_and_the_model_does_not_see_them():
    model, teacher = tiny(seed=0), tiny(seed=1)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    found, _ = loss.loss_of(model, teacher, {**inputs, data.SHARE: torch.tensor([1.0, 0.25])}, 0.6, True)
    each = [
        loss.loss_of(model, teacher, {n: x[row : row + 1] for n, x in inputs.items()}, share, True)[0]
        for row, share in enumerate((1.0, 0.25))
    ]
    torch.testing.assert_close(found, sum(each) / 2)


def test_batches_pad_what_is_long_and_keep_tuples():
    examples = [
        {"labels": torch.tensor([1, 2]), "ids": torch.tensor([5, 6]), "mask": torch.ones(2), "x": (torch.ones(3, 2),)},
        {"labels": torch.tensor([3]), "ids": torch.tensor([7]), "mask": torch.ones(1), "x": (torch.zeros(3, 2),)},
    ]
    batch = data.Collator(9)(examples)
    assert batch["labels"].tolist() == [[1, 2], [3, IGNORED]]
    assert batch["ids"].tolist() == [[5, 6], [7, 9]] and batch["mask"].tolist() == [[1, 1], [1, 0]]
    assert isinstance(batch["x"], tuple) and batch["x"][0].shape == (2, 3, 2)


def test_globs_freeze_and_a_wrong_one_is_named(tiny_llama):
    finetune.freeze(tiny_llama, ["*.self_attn.*"])
    frozen = {name for name, p in tiny_llama.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in tiny_llama.named_parameters() if ".self_attn." in name}
    with pytest.raises(LillamaError, match=r"finetune\.freeze: no parameter matches 'nothing'"):
        finetune.freeze(tiny_llama, ["nothing"])
    with pytest.raises(LillamaError, match="everything is frozen"):
        finetune.freeze(tiny_llama, ["*"])


def test_the_number_of_updates_rounds_up():
    assert data.updates(17, Finetune(batch_size=4, gradient_accumulation=2, epochs=3)) == 9


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12), share=st.floats(0, 0.9))
def test_examples_of_one_source_are_held_out_together(sizes, share):
    examples = [
        {"input_ids": torch.tensor([i, j]), "source": f"clip {i}"} for i, n in enumerate(sizes) for j in range(n)
    ]
    learned, held = data.split(examples, share, torch.Generator().manual_seed(0))
    sources = [{int(e["input_ids"][0]) for e in part} for part in (learned, held)]
    assert not sources[0] & sources[1]
    assert len(learned) + len(held) == len(examples)
    assert bool(held) == (share > 0 and len(sizes) > 1)
    assert learned
    assert all("source" not in example for example in (*learned, *held))


@pytest.mark.parametrize("shifted", [True, False])
def test_a_trainer_stays_on_the_card_that_was_asked_for(tmp_path, monkeypatch, shifted):
    """With several cards in the machine, transformers would take the first and split batches over all of them."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    device = Device(torch.device("cuda:1"), torch.float32)
    section = Finetune.model_validate({"steps": 2})
    setting = trainer.Setting(section, device, RunDirectory(tmp_path), Progress())
    arguments = trainer.arguments(setting, 2, False, shifted)
    assert arguments.device == torch.device("cuda:1") and current[-1] == torch.device("cuda:1")
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == section.batch_size
