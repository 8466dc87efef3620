"""Text that the model writes itself: in rounds that survive a stop, kept with what it was made of, read by a run."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import CONFIGS, tiny, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from lillama.base.progress import Progress
from lillama.base.rundir import OWN_TEXT
from lillama.base.stop import Stopped
from lillama.cli import main as cli
from lillama.errors import LillamaError
from lillama.recipe.schema import Generate, Recipe
from lillama.run import duration, openings, owntext, pipeline, prepare, sweep, sweepfile, writing
from lillama.run.estimate import estimate
from lillama.run.speeds import Speeds

TEMPLATE = "{% for m in messages %}</s> the {{ m.content }} mat{% endfor %}"
GENERATE = {"tokens": 240, "length": 12, "batch": 4}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model of the tokenizer's own twelve tokens, which has a chat template."""
    home = tmp_path_factory.mktemp("texts") / "model"
    config = copy.deepcopy(CONFIGS["mistral"])
    config.vocab_size = 12
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(home)
    reader = tokenizer()
    reader.chat_template = TEMPLATE
    reader.save_pretrained(home)
    return home


def settings(model, out, **sections):
    base = {
        "model": {"id": str(model), "dtype": "float32"},
        "compress": {"reduction": 0.1, "of": "weights", "strategy": "uniform", "init": "svd", "rank_multiple": 2},
        "calibration": {"generate": GENERATE, "sequence_length": 16},
        "distill": {"batch_size": 4},
        "run": {"out": str(out), "device": "cpu", "compute": "float32"},
    }
    return base | sections


def own(model, out, **generate):
    calibration = {"generate": GENERATE | generate, "sequence_length": 16}
    recipe = Recipe.parse(settings(model, out, calibration=calibration))
    return owntext.OwnText(prepare.prepare(recipe), out, Progress())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rounds_written(monkeypatch):
    """The numbers of the rounds that were written, and the round at which a signal comes."""
    done: list[int] = []
    stop_at: list[int] = []
    write = owntext.write_round

    def watched(model, reader, begin, how, this):
        if this.number in stop_at:
            raise Stopped(2)
        done.append(this.number)
        return write(model, reader, begin, how, this)

    monkeypatch.setattr(owntext, "write_round", watched)
    return done, stop_at


def test_each_kind_of_beginning_has_its_part_of_any_part_of_the_text(model_dir, tmp_path):
    found = rows(own(model_dir, tmp_path).path())
    assert len(found) == 20  # 240 tokens of 12 a text
    assert all(row["text"].startswith("</s> the") == (row["begin"] == "user") for row in found[::2])
    for part in (found[:10], found[-4:]):
        assert {row["begin"] for row in part} == {"user", "start"}
    assert len({row["text"] for row in found}) > 10


def test_text_is_sampled_by_the_seed_and_nobody_else_draws_otherwise(model_dir, tmp_path):
    state = torch.get_rng_state()
    first = own(model_dir, tmp_path / "a").path().read_bytes()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert own(model_dir, tmp_path / "b").path().read_bytes() == first
    assert own(model_dir, tmp_path / "c", seed=1).path().read_bytes() != first
    cold = rows(own(model_dir, tmp_path / "d", temperature=0.01, begin=["start"]).path())
    assert len({row["text"] for row in cold}) < 3  # next to the same choice everywhere


def test_a_model_whose_predictions_are_not_finite_writes_nothing(model_dir):
    model = tiny("llama")
    model.model.norm.weight.data[0] = torch.nan
    how, this = writing.Writing(tokens=24, length=12), writing.Round(0, "prompts", 0, 2)
    with pytest.raises(LillamaError, match="not finite"):
        writing.write_round(model, tokenizer(), [[5]], how, this)


def test_tokens_are_drawn_by_their_chance_and_the_temperature():
    scores = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(30_000, 4)
    drawn = writing.Drawn(torch.tensor(0.5), 0, torch.device("cpu"))
    shares = torch.bincount(drawn(torch.zeros(30_000, 1), scores).argmax(-1), minlength=4) / 30_000
    torch.testing.assert_close(shares, (scores[0] / 0.5).softmax(-1), rtol=0, atol=0.02)
    assert drawn.finite


def test_several_temperatures_are_taken_in_turn_by_the_texts_of_every_kind(model_dir, tmp_path):
    """At next to nothing all texts of one beginning are the same; at 2 they are not."""
    found = rows(own(model_dir, tmp_path / "run", temperature=[1e-5, 2.0]).path())
    for kind in ("user", "start"):
        texts = [row["text"] for row in found if row["begin"] == kind]
        assert len(set(texts[0::2])) == 1 and len(set(texts[1::2])) > 3
    # Each of several beginnings meets every temperature.
    for count in (1, 2, 3, 91):
        how = writing.Writing(tokens=1, temperatures=(1.0, 1.2))
        met = {(number % count, how.temperature(number, count)) for number in range(2 * count)}
        assert len(met) == 2 * count
    # One of a list is one alone.
    alone = own(model_dir, tmp_path / "alone", temperature=1.5).path().read_bytes()
    assert own(model_dir, tmp_path / "list", temperature=[1.5]).path().read_bytes() == alone


def test_writing_that_was_stopped_goes_on_with_its_round_to_the_same_text(model_dir, tmp_path, rounds_written):
    done, stop_at = rounds_written
    whole = own(model_dir, tmp_path / "a").path().read_bytes()
    assert done == list(range(6))
    done.clear()
    stop_at.append(3)
    with pytest.raises(Stopped):
        own(model_dir, tmp_path / "b").path()
    assert done == [0, 1, 2] and not (tmp_path / "b" / OWN_TEXT).exists()
    stop_at.clear()
    (tmp_path / "b/calibration/own.0001.json").write_text('{"texts": ["damaged')
    assert own(model_dir, tmp_path / "b").path().read_bytes() == whole
    assert done == [0, 1, 2, 1, 3, 4, 5]
    assert sorted(p.name for p in (tmp_path / "b/calibration").iterdir()) == ["own.json", "own.jsonl"]


def test_text_is_used_again_while_it_is_whole_and_of_the_same_making(model_dir, tmp_path, rounds_written):
    done, _ = rounds_written
    path = own(model_dir, tmp_path).path()
    whole = path.read_bytes()
    own(model_dir, tmp_path, split="train[:50%]", weight=2.0).path()  # what becomes of it is another thing
    assert len(done) == 6
    path.write_bytes(whole.replace(b"cat", b"mat", 1))
    assert own(model_dir, tmp_path).path().read_bytes() == whole and len(done) == 12
    assert own(model_dir, tmp_path, temperature=2.0).path().read_bytes() != whole


def test_texts_begin_with_prompts(model_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a mat\n\nthe cat sat on a mat and ran and ran and ran\nsat\n")
    path = own(model_dir, tmp_path / "run", prompts=str(tmp_path / "prompts.txt"), begin=[]).path()
    texts = [row["text"] for row in rows(path)]
    assert len(texts) == 20
    begun = [sum(text.startswith(one) for text in texts) for one in ("a mat", "the cat sat on a mat", "sat")]
    assert min(begun) >= 6  # in turn; the long one is cut to half of a text
    assert len(set(texts)) > 10
    mixed = rows(own(model_dir, tmp_path / "mixed", prompts=str(tmp_path / "prompts.txt")).path())
    assert [row["begin"] for row in mixed[:6]] == ["user", "start", "prompts"] * 2


def test_texts_begin_with_openings_of_which_the_tokenizer_has_all_words(model_dir, tmp_path, monkeypatch):
    assert len(set(openings.OPENINGS)) == len(openings.OPENINGS) and all(map(str.strip, openings.OPENINGS))
    assert not any(one.endswith(" ") for one in openings.OPENINGS)
    monkeypatch.setattr(writing, "OPENINGS", ("a mat", "the zebra", "sat", "ran and ran and ran and ran and ran"))
    found = rows(own(model_dir, tmp_path).path())
    assert [row["begin"] for row in found[:6]] == ["user", "start", "openings"] * 2
    begun = [row["text"] for row in found if row["begin"] == "openings"]
    assert all(any(text.startswith(one) for text in begun) for one in ("a mat", "sat", "ran and ran and ran"))
    assert not any(text.startswith("the zebra") for text in begun)
    ways = {str(writing.beginnings(tokenizer(), Generate(seed=seed))["openings"]) for seed in range(8)}
    assert len(ways) > 2  # in an order of the seed
    assert "openings" not in writing.beginnings(tokenizer(), Generate(begin=["user", "start"]))


def test_what_stands_before_a_shorter_prompt_is_not_of_its_text(model_dir):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    how = writing.Writing(tokens=24, length=12, batch=2, temperatures=(0.001,))
    this = writing.Round(0, "prompts", 0, 2)
    short, long = writing.write_round(model, tokenizer(), [[5], [4, 5, 6, 7]], how, this)
    alone = writing.write_round(model, tokenizer(), [[5]], how, writing.Round(0, "prompts", 0, 1))
    assert long.startswith("the cat sat on") and len(long.split()) == 12
    assert short.startswith("cat") and len(short.split()) == 9  # the eight new ones that the long one has as well
    assert alone[0].startswith("cat") and len(alone[0].split()) == 12


def test_a_round_of_few_texts_still_has_every_kind():
    found = writing.rounds(writing.Writing(tokens=60, length=12, batch=32), ["user", "start"])
    assert [(one.kind, one.first, one.texts) for one in found] == [("user", 0, 3), ("start", 0, 2)]
    many = writing.rounds(writing.Writing(tokens=1200, length=12, batch=32), ["user", "start"])
    assert [(one.kind, one.first, one.texts) for one in many] == [
        ("user", 0, 25), ("start", 0, 25), ("user", 25, 25), ("start", 25, 25),
    ]  # fmt: skip


def test_a_tokenizer_that_has_nothing_to_begin_with_is_refused():
    reader = tokenizer()
    assert writing.beginnings(reader, Generate.model_validate({})) == {"start": [[2]]}
    reader.eos_token = None
    with pytest.raises(LillamaError, match="no token that a text begins with") as caught:
        writing.beginnings(reader, Generate.model_validate({}))
    assert "prompts" in str(caught.value)


# Runs

LEARNS = {"teacher": 1.0, "steps": 2, "batch_size": 2, "sequence_length": 16, "checks": 1}
HELD = {"perplexity": {"dataset": "{run.out}/calibration/own.jsonl", "split": "train[50%:]", "sequence_length": 16}}


def compressed(model, out, **more):
    calibration = {"generate": GENERATE | {"split": "train[:50%]"}, "sequence_length": 16}
    recipe = Recipe.parse(settings(model, out, calibration=calibration, finetune=LEARNS, evaluate=HELD, **more))
    return pipeline.compress(recipe)


@pytest.mark.slow
def test_a_run_needs_no_data_and_one_that_was_stopped_as_it_wrote_ends_the_same(model_dir, tmp_path, rounds_written):
    done, stop_at = rounds_written
    whole = compressed(model_dir, tmp_path / "a")
    assert done == list(range(6)) and whole.path.name == "finetuned"
    assert whole.metrics["before"]["perplexity/perplexity"] > 1
    stop_at.append(2)
    with pytest.raises(Stopped):
        compressed(model_dir, tmp_path / "b")
    stop_at.clear()
    again = compressed(model_dir, tmp_path / "b")
    assert done == [*range(6), 0, 1, 2, 3, 4, 5]
    first, second = (load_file(result.path / "model.safetensors") for result in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    compressed(model_dir, tmp_path / "b")  # nothing is left to do
    assert len(done) == 12


@pytest.mark.slow
def test_a_restart_reads_the_text_that_is_there(model_dir, tmp_path, rounds_written):
    done, _ = rounds_written
    compressed(model_dir, tmp_path)
    recipe = Recipe.load(tmp_path / "recipe.resolved.yaml")
    pipeline.compress(recipe, restart=True)
    assert len(done) == 6 and (tmp_path / OWN_TEXT).is_file()


def test_the_directory_of_another_run_is_refused_before_anything_is_written(model_dir, tmp_path, rounds_written):
    done, _ = rounds_written
    compressed(model_dir, tmp_path / "run")
    kept = (tmp_path / "run" / OWN_TEXT).read_bytes()
    for other in ({"seed": 5}, {"tokens": 480}):
        calibration = {"generate": GENERATE | other, "sequence_length": 16}
        with pytest.raises(LillamaError, match="holds another run"):
            pipeline.compress(Recipe.parse(settings(model_dir, tmp_path / "run", calibration=calibration)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(LillamaError, match="not an empty directory"):
        pipeline.compress(Recipe.parse(settings(model_dir, tmp_path / "mine")))
    assert len(done) == 6 and (tmp_path / "run" / OWN_TEXT).read_bytes() == kept
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_runs_of_a_sweep_share_what_the_model_writes(model_dir, tmp_path, rounds_written):
    done, _ = rounds_written
    base = tmp_path / "base.yaml"
    calibration = {"generate": GENERATE | {"split": "train[:50%]"}, "sequence_length": 16}
    base.write_text(json.dumps(settings(model_dir, tmp_path / "unused", calibration=calibration, evaluate=HELD)))
    axes = {"compress.reduction": [0.1, 0.2], "calibration.generate.seed": [0, 1]}
    found = sweepfile.Sweep.model_validate({"base": str(base), "axes": axes, "out": str(tmp_path / "out")})
    made = sweep.run(found, base, Progress())
    assert not any(row.error for row in made) and len(made) == 4
    assert len(done) == 12  # two texts, for four runs
    texts = [(row.directory / OWN_TEXT).read_bytes() for row in made]
    assert texts[0] == texts[2] != texts[1] == texts[3]
    perplexities = [row.metrics["before"]["perplexity/perplexity"] for row in made]
    assert perplexities[0] == perplexities[2] != perplexities[1]  # each is measured on its own


def test_a_mixture_of_data_and_own_text_is_a_run(model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran . \n" * 60)
    calibration = {
        "dataset": str(tmp_path / "text.txt"), "generate": {"length": 12, "batch": 4, "weight": 2.0},
        "sequence_length": 16, "tokens": 192,
    }  # fmt: skip
    recipe = Recipe.parse(settings(model_dir, tmp_path / "run", calibration=calibration))
    run = pipeline.Run(prepare.prepare(recipe), Progress())
    assert sum(batch["input_ids"].numel() for batch in run.batches()) == 192
    assert run.execute().metrics["parameters"]["after"] > 0


@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
def test_a_model_that_continues_no_text_is_refused_when_it_is_planned(kind, tmp_path, capsys):
    if kind == "encoder":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        BertForMaskedLM(BertConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "model")
    else:
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        T5ForConditionalGeneration(T5Config(vocab_size=64, **shape)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(json.dumps(settings(tmp_path / "model", tmp_path / "run")))
    assert cli.main(["plan", str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr().err
    assert "calibration.generate" in said and "does not continue text" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "generate, said", [({"prompts": "./gone.txt"}, "gone.txt"), ({"length": 65}, "longer than the 64 positions")]
)
def test_what_cannot_be_written_is_told_when_a_run_is_planned(model_dir, tmp_path, generate, said):
    calibration = {"generate": generate, "sequence_length": 16}
    with pytest.raises(LillamaError, match=said) as caught:
        prepare.prepare(Recipe.parse(settings(model_dir, tmp_path / "run", calibration=calibration)))
    assert f"calibration.generate.{next(iter(generate))}" in str(caught.value)


def test_an_estimate_has_the_writing_in_it(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "measure_speeds", lambda run: Speeds(*[1e6] * len(Speeds._fields)))
    seconds = []
    for tokens in (240, 480):
        calibration = {"generate": GENERATE | {"tokens": tokens}, "sequence_length": 16, "tokens": 160}
        found = prepare.prepare(Recipe.parse(settings(model_dir, tmp_path, calibration=calibration)))
        seconds.append(estimate(found.source, found.plan, found.recipe, found.device).seconds)
    assert seconds[1] - seconds[0] == pytest.approx(duration.WRITING * 2 * found.plan.before * 240 / 1e6)
    alone = prepare.prepare(Recipe.parse(settings(model_dir, tmp_path)))
    assert estimate(alone.source, alone.plan, alone.recipe, alone.device).tokens == 240
