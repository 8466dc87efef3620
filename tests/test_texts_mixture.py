"""Several sources of calibration text in one recipe: whose tokens they are, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import tokenizer

from lillama.data.text import token_blocks
from lillama.errors import LillamaError
from lillama.finetune.data import SHARE, text_examples
from lillama.recipe.calibration import Calibration
from lillama.recipe.schema import Finetune, Recipe

CAT, SAT, RAN, END = 5, 6, 11, 2
WORDS = {"cat": CAT, "sat": SAT, "ran": RAN}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A file for each of three words, of 400 tokens and as many ends of lines as there are chunks."""
    place = tmp_path_factory.mktemp("texts")
    for word in WORDS:
        (place / f"{word}.txt").write_text(f"{' '.join([word] * 8)} \n\n" * 50)
    return place


def section(home, *weights, **options):
    data = [{"dataset": str(home / f"{w}.txt"), "weight": weight} for w, weight in zip(WORDS, weights)]
    return Calibration.model_validate({"datasets": data, "sequence_length": 16, "tokens": 128} | options)


def words_of(blocks):
    """Which words each block has."""
    return [set(block.tolist()) - {END} for block in blocks]


@pytest.mark.parametrize(
    "weights, shares", [((3, 1), (6, 2)), ((1, 1, 1), (3, 3, 2)), ((0.2, 0.5, 0.3), (2, 4, 2)), ((7,), (8,))]
)
def test_every_source_gives_its_share_of_blocks_of_its_own(home, weights, shares):
    found = words_of(token_blocks(tokenizer(), section(home, *weights)))
    assert all(len(one) == 1 for one in found)
    assert [sum(word in one for one in found) for word, _ in zip(WORDS.values(), weights)] == list(shares)
    assert len(found) == 8


def test_blocks_are_shuffled_by_the_seed(home):
    def order(seed):
        return torch.cat(list(token_blocks(tokenizer(), section(home, 1, 1, seed=seed)))).tolist()

    found = words_of(token_blocks(tokenizer(), section(home, 1, 1)))
    assert {CAT} in found[:4] and {SAT} in found[:4]  # not the one after the other
    assert order(0) == order(0) != order(1)


def test_tokens_that_fill_no_sequence_are_left_out(home):
    assert token_blocks(tokenizer(), section(home, 1, 1, tokens=63)).shape == (3, 16)


def test_a_source_with_less_than_its_share_is_named(home):
    (home / "few.txt").write_text("the mat " * 20)
    data = [{"dataset": str(home / "cat.txt")}, {"dataset": str(home / "few.txt"), "weight": 3}]
    short = Calibration.model_validate({"datasets": data, "sequence_length": 16, "tokens": 128})
    with pytest.raises(LillamaError, match=r"few.txt' has 32 tokens in .* 96 are its share") as caught:
        token_blocks(tokenizer(), short)
    assert caught.value.where == "calibration.datasets.1"


def test_what_is_wrong_with_one_of_several_is_said_of_that_one(home):
    data = [{"dataset": str(home / "cat.txt")}, {"dataset": str(home / "gone.txt")}]
    gone = Calibration.model_validate({"datasets": data, "sequence_length": 16, "tokens": 128})
    with pytest.raises(LillamaError) as caught:
        token_blocks(tokenizer(), gone)
    assert caught.value.where == "calibration.datasets.1.dataset"


def test_the_model_writes_when_all_data_were_read(home):
    own = home / "own.jsonl"
    own.write_text('{"text": "' + "ran " * 100 + '"}\n')
    given = {"dataset": str(home / "cat.txt"), "generate": {"weight": 3}, "sequence_length": 16, "tokens": 64}
    mixed = Calibration.model_validate(given)
    found = words_of(token_blocks(tokenizer(), mixed, own=lambda: own))
    assert found.count({RAN}) == 3 and found.count({CAT}) == 1
    bad = mixed.model_copy(update={"dataset": str(home / "gone.txt")})
    with pytest.raises(LillamaError, match=r"gone\.txt"):
        token_blocks(tokenizer(), bad, own=lambda: pytest.fail("the model wrote for nothing"))


def test_fine_tuning_learns_from_the_same_mixture(home):
    recipe = Recipe.parse(
        {
            "model": {"id": "m"},
            "compress": {"reduction": 0.1},
            "calibration": section(home, 3, 1).model_dump(),
            "run": {"out": "o"},
        }
    )
    examples = text_examples(tokenizer(), recipe, Finetune(sequence_length=16))
    found = words_of([example["input_ids"] for example in examples])
    assert found.count({CAT}) == 6 and found.count({SAT}) == 2
    more = text_examples(tokenizer(), recipe, Finetune(sequence_length=8, tokens=192))
    assert len(more) == 24  # of other length, and more of them
    own = text_examples(tokenizer(), recipe, Finetune(sequence_length=16, dataset=str(home / "ran.txt"), tokens=64))
    assert words_of([example["input_ids"] for example in own]) == [{RAN}] * 4


def shares_of(examples):
    """The share of every example, by what it says."""
    return {min(words): float(one.get(SHARE, -1)) for one in examples for words in words_of([one["input_ids"]])}


def test_what_the_model_wrote_is_learned_from_its_predictions_alone(home, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "' + "ran " * 100 + '"}\n')
    given = {"dataset": str(home / "cat.txt"), "generate": {"weight": 3}, "sequence_length": 16, "tokens": 64}
    given = {"model": {"id": "m"}, "compress": {"reduction": 0.1}, "calibration": given, "run": {"out": "o"}}
    recipe = Recipe.parse(given)

    def learned(**options):
        section = Finetune.model_validate({"sequence_length": 16} | options)
        return shares_of(text_examples(tokenizer(), recipe, section, lambda of: own))

    assert learned(teacher=0.75) == {CAT: 0.75, RAN: 1.0}
    assert learned(teacher=1.0) == learned() == {CAT: -1, RAN: -1}  # all alike, and no teacher at all
    recipe = Recipe.parse(given | {"calibration": {"generate": {}, "sequence_length": 16, "tokens": 64}})
    assert learned(teacher=0.75) == {RAN: 1.0}
    elsewhere = [{"dataset": str(home / "cat.txt")}, {"dataset": str(home / "sat.txt"), "teacher": 0.5}]
    assert learned(teacher=0.75, datasets=elsewhere, tokens=64) == {CAT: 0.75, SAT: 0.5}
    section = Finetune.model_validate({"datasets": elsewhere, "tokens": 64, "sequence_length": 16})
    data = section.data(recipe.calibration, "")
    assert section.taught and section.shares(data) == [0.0, 0.5]
    assert section.taught_alone().shares(data) == [1.0, 1.0]


@pytest.mark.parametrize(
    "given, said",
    [
        ("{dataset: a, datasets: [{dataset: b}], tokens: 9999}", "both dataset and datasets"),
        ("{datasets: [{dataset: b}]}", "a mixture needs tokens"),
        ("{datasets: [{dataset: b}], tokens: 9999, split: dev}", "split belongs to a dataset, and datasets"),
        ("{datasets: [{dataset: b, teacher: 2}], tokens: 9999}", "finetune.datasets.0.teacher: input should be less"),
        ("{datasets: [{dataset: b, techer: 1}], tokens: 9999}", "Did you mean 'teacher'"),
    ],
)
def test_what_does_not_go_together_in_training_is_refused(given, said):
    text = f"model: {{id: m}}\ncompress: {{reduction: 0.1}}\nrun: {{out: o}}\nfinetune: {given}\n"
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(text + "calibration: {dataset: a}\n")
    assert said in str(caught.value) and "recipe:4" in str(caught.value)


@pytest.mark.parametrize(
    "given, said",
    [
        ("{}", "the key 'calibration.dataset' is missing"),
        ("{dataset: a, datasets: [{dataset: b}], tokens: 9999}", "both dataset and datasets"),
        (
            "{datasets: [{dataset: b, weight: 0}], tokens: 9999}",
            "calibration.datasets.0.weight: input should be greater",
        ),
        (
            "{datasets: [{dataset: b, weight: -1}], tokens: 9999}",
            "calibration.datasets.0.weight: input should be greater",
        ),
        ("{generate: {weight: 0}}", "calibration.generate.weight: input should be greater than 0"),
        ("{datasets: [], tokens: 9999}", "calibration.datasets"),
        ("{datasets: [{dataset: b, splt: x}], tokens: 9999}", "Did you mean 'split'"),
        ("{datasets: [{dataset: b}]}", "a mixture needs tokens"),
        ("{dataset: a, generate: {}}", "a mixture needs tokens"),
        ("{datasets: [{dataset: b}], tokens: 9999, split: dev}", "split belongs to a dataset, and datasets"),
        ("{generate: {}, column: text}", "column belongs to a dataset, and generate"),
        ("{generate: {begin: []}}", "begins its texts with nothing"),
        ("{generate: {begin: [usr]}}", "calibration.generate.begin.0"),
        ("{dataset: a, generate: {weight: 0.01}, tokens: 2048}", "less than a sequence"),
        ("{dataset: a, generate: {tokens: 512}, tokens: 4096}", "fewer than the 2048 of tokens that are its share"),
    ],
)
def test_what_does_not_go_together_is_refused(given, said):
    text = f"model: {{id: m}}\ncompress: {{reduction: 0.1}}\nrun: {{out: o}}\ncalibration: {given}\n"
    with pytest.raises(LillamaError) as caught:
        Recipe.parse(text)
    assert said in str(caught.value) and "recipe:4" in str(caught.value)


def test_a_mixture_is_written_and_read_again():
    given = {"datasets": [{"dataset": "a", "weight": 2}, {"dataset": "b"}], "generate": {"seed": 3}, "tokens": 8192}
    recipe = Recipe.parse(
        {"model": {"id": "m"}, "compress": {"reduction": 0.1}, "calibration": given, "run": {"out": "o"}}
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.calibration.shares == [4096, 2048, 2048]
    assert recipe.calibration.written == 2304  # its share, and an eighth
