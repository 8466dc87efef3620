"""A run that several processes share ends with the weights of one that a single process makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch import nn

from lillama.base import device, ranks, shares
from lillama.cli.main import main
from lillama.errors import LillamaError
from lillama.finetune.elsewhere import Elsewhere, help_with, share_out
from lillama.finetune.loss import loss_of
from lillama.finetune.together import Together, own_of
from lillama.pretrained import predictions
from lillama.pretrained.rows import own_rows

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import families
import kill_processes

# Each of the four families, both schedules, Fisher information and Grams, fine-tuning; the others of processes.CASES
# are run by hand.
TRIED = ("llama", "llama-apart", "llama-neurons", "llama-divided", "mixtral-concurrent", "mamba-concurrent", "whisper")
CLOSE = 1e-5  # of a tensor's largest number


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of all cases by two processes: one start for all, since it is what takes longest."""
    place = tmp_path_factory.mktemp("processes")
    for name in TRIED:
        processes.prepare(place, name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tests = Path(__file__).parent
    paths = {"PYTHONPATH": f"{tests}:{tests.parent}:{tests.parent / 'plugins'}"}
    done = subprocess.run(
        [*launcher, str(tests / "processes.py"), str(place), *TRIED],
        capture_output=True,
        text=True,
        env=kill_processes.environment() | paths,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_two_processes_end_with_the_weights_of_one(home, name):
    metrics = processes.run(home, name, "one")
    gaps = processes.apart(home, name, "one", "together")
    assert gaps, "there are no weights to compare"
    assert max(gaps.values()) < CLOSE, max(gaps, key=gaps.__getitem__)
    measured = processes.metrics(home, name, "together")
    for stage in ("before", "after", "finetuned", "quantized"):
        close = 1e-2 if stage == "quantized" else 1e-4
        assert measured.get(stage, {}) == pytest.approx(metrics.get(stage, {}), rel=close)
    assert measured["parameters"] == metrics["parameters"]


@pytest.mark.slow
def test_a_run_that_lost_a_process_stops_and_three_finish_it(tmp_path):
    recipe = kill_processes.families.prepare(tmp_path, "llama", "concurrent")
    took, said = kill_processes.kill(recipe, tmp_path / "run", 2, victim=1, after=0.5)
    assert took < kill_processes.LIMIT
    assert "process 1 of 2" in said and "continues where it was" in said
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    kill_processes.finish(recipe, tmp_path / "run", 3)
    assert main(["run", str(recipe), "--set", f"run.out={tmp_path / 'alone'}"]) == 0
    gaps = processes.apart(tmp_path, ".", "run", "alone")
    assert gaps and max(gaps.values()) < CLOSE


def among(monkeypatch, rank, world):
    monkeypatch.setattr(ranks._group, "rank", rank)
    monkeypatch.setattr(ranks._group, "world", world)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_row_of_a_batch_counts_in_one_process(monkeypatch, count):
    batch = {"input_ids": torch.arange(count)[:, None], "digest": torch.zeros(5)}
    seen = []
    for rank in range(3):
        among(monkeypatch, rank, 3)
        rows, counts = own_rows(batch, 0)
        assert len(rows["input_ids"]) >= 1, "a process must have something to run"
        seen += rows["input_ids"].flatten().tolist() if counts else []
    assert seen == list(range(count))


def test_rows_that_belong_together_stay_together(monkeypatch):
    batch = {"input_ids": torch.zeros(6, 4), "attention_mask": torch.zeros(3, 4)}
    for number in range(4):
        counting = []
        for rank in range(2):
            among(monkeypatch, rank, 2)
            rows, counts = own_rows(batch, number)
            assert all(torch.equal(rows[name], batch[name]) for name in batch)
            counting.append(counts)
        assert counting.count(True) == 1


@pytest.mark.parametrize(("rows", "world"), [((1,), 2), ((1, 1, 1, 1), 2), ((3, 3, 2), 2), ((2, 2), 3)])
def test_every_example_of_an_update_is_of_one_process(monkeypatch, rows, world):
    labels = iter(range(100))
    batches = [{"labels": torch.tensor([next(labels) for _ in range(n)]), "x": (torch.zeros(n, 2),)} for n in rows]
    seen = []
    for rank in range(world):
        among(monkeypatch, rank, world)
        own = own_of(batches)
        assert [len(one["labels"]) for one in own] == [len(one["x"][0]) for one in own]
        assert len(own) == len(batches), "the trainer counts batches"
        seen += [label for one in own for label in one["labels"].tolist()]
    assert seen == list(range(sum(rows)))


@pytest.mark.parametrize(
    ("counts", "world", "expected"),
    [
        ([1], 2, [[(0, 1, 0)]]),  # row, who learns from it, who helps
        ([1, 1], 4, [[(0, 1, 0)], [(0, 3, 2)]]),
        ([1], 1, [[]]),
        ([2], 2, [[]]),  # nobody is idle
        ([2, 1], 5, [[(0, 1, 0), (1, 3, 2)], [(0, 4, 0)]]),
    ],
)
def test_who_has_no_row_of_an_update_helps_one_who_has(monkeypatch, counts, world, expected):
    among(monkeypatch, 0, world)
    helps = share_out(counts, families.MODELS["llama"]())
    assert [[(one.row, one.learner, one.helper) for one in batch] for batch in helps] == expected
    assert share_out(counts, None) == [[] for _ in counts]


@pytest.mark.parametrize("at_once", [1 << 20, 64])
def test_predictions_made_elsewhere_are_learned_as_ones_own(monkeypatch, at_once):
    monkeypatch.setattr(predictions, "LOGITS", at_once)  # of all positions, and of a few at a time
    torch.manual_seed(0)
    model, teacher = (families.MODELS["llama"]() for _ in range(2))
    ids = torch.randint(0, 20, (1, 12))
    inputs, handed = {"input_ids": ids, "labels": ids}, []
    monkeypatch.setattr(ranks, "hand", lambda output, to: handed.append((output, to)))
    monkeypatch.setattr(ranks, "receive", lambda source: handed.pop()[0])
    help_with(teacher, {"input_ids": ids}, learner=1)
    assert handed[0][1] == 1
    losses, gradients = [], []
    for original in (teacher, Elsewhere(teacher, helper=0)):
        model.zero_grad()
        loss, _ = loss_of(model, original, inputs, 0.5, True)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and not handed
    for own, other in zip(*gradients):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divide", [False, True])
def test_held_out_batches_are_shared_out(monkeypatch, divide):
    losses, sums, ran = [1.0, 2.0, 3.0, 5.0, 7.0], [], []

    class Trainer:
        model = nn.Linear(1, 1)

        def prediction_step(self, model, batch, loss_alone):
            ran.append(batch["loss"])
            return (torch.tensor(batch["loss"]),)

    class Both(Together, Trainer):
        divided = divide

    monkeypatch.setattr(ranks, "summed", lambda found: sums.extend(found) or [0.0])
    batches = [{"labels": torch.zeros(2), "loss": loss} for loss in losses]
    counts = []
    for rank in range(3):
        among(monkeypatch, rank, 3)
        ran.clear()
        assert Both().evaluation_loop(batches).num_samples == 10
        counts.append(len(ran))
    assert sum(sums) == 2 * sum(losses), "each batch counts once"
    assert counts == ([2, 2, 2] if divide else [2, 2, 1]), "of a divided model all run equally often"


def test_things_are_done_one_by_each_process(monkeypatch):
    given = []
    for rank in range(2):
        among(monkeypatch, rank, 2)
        monkeypatch.setattr(ranks, "collect", lambda own: given.append(own) or ([own, own] if ranks.is_first() else []))
        seen = [*shares.one_each("abc", lambda item: (item, ranks.rank(), ranks.world()))]
        assert [item for item, _ in seen] == ["a", "b", "c"]
        assert all((found is not None) == (rank == 0) for _, found in seen)
    assert given == [("a", 0, 1), ("c", 0, 1), ("b", 0, 1), None], "who works knows of no others"


def test_what_is_added_up_travels_in_few_messages(monkeypatch):
    among(monkeypatch, 0, 2)
    monkeypatch.setattr(ranks, "BUCKET", 200)
    sent = []
    monkeypatch.setattr(ranks, "_together", lambda _, tensor: sent.append(tensor.nbytes) or tensor.mul_(2))
    double = torch.ones(2, dtype=torch.float64)
    tensors = [*(torch.ones(3) for _ in range(4)), torch.ones(5, 7).T, torch.ones(7, 7), double]
    ranks.sum_(tensors)
    assert all((tensor == 2).all() for tensor in tensors)
    assert sent == [4 * 12 + 140, 196, 16], "some together, one that fills a message, another type"


def test_tasks_are_shared_out_by_what_they_cost(monkeypatch):
    among(monkeypatch, 0, 2)
    costs = [1.0, 9.0, 4.0, 4.0, 1.0]
    owners = shares.owners(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners) if owner == which) for which in range(2)]
    assert sorted(loads) == [9.0, 10.0]


def test_one_process_needs_no_others():
    parameter = nn.Parameter(torch.ones(2))
    ranks.sum_gradients_([parameter], torch.ones(1))
    assert parameter.grad is None
    assert ranks.gather(3) == [3] and ranks.agree("a") == "a" and ranks.summed([1.5]) == [1.5]
    assert shares.share([1, 2, 3]) == [1, 2, 3] and [*shares.part(3)] == [0, 1, 2]


@pytest.fixture
def started(monkeypatch):
    """As a launcher starts the first of two processes."""
    for word, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(word, str(value))


def test_a_model_split_otherwise_than_we_can_is_refused_by_name(started, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LillamaError, match="DeepSpeed is not supported"):
        ranks.join()


def test_accelerate_s_word_for_fsdp_is_heard(started, monkeypatch):
    meeting = sys.modules["torch.distributed.rendezvous"]  # torch.distributed has a function of that name
    monkeypatch.setattr(meeting, "rendezvous", lambda *_, **__: fail(LillamaError("nobody comes")))
    monkeypatch.setattr(ranks._group, "divide", False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LillamaError, match="nobody comes"):
        ranks.join()
    assert ranks.asked_to_divide()


def test_a_verb_that_cannot_be_shared_says_so(started, capsys):
    assert main(["recipes"]) == 2
    assert "lillama recipes works in one process" in capsys.readouterr().err


def test_of_several_processes_each_takes_its_card(monkeypatch):
    monkeypatch.setattr(ranks._group, "local", 3)
    with pytest.raises(LillamaError, match="cuda:3"):  # there is none here
        device.choose("cuda")


def test_what_one_process_fails_at_alone_all_of_them_hear_of(monkeypatch):
    among(monkeypatch, 1, 2)
    monkeypatch.setattr(ranks, "agree", lambda _: (None, "the disk is full"))
    with pytest.raises(ranks.SaidError, match="the disk is full"):
        ranks.by_first(lambda: pytest.fail("the first alone does it"))


def test_the_first_process_works_alone_while_others_wait(monkeypatch):
    among(monkeypatch, 0, 2)
    told = []
    monkeypatch.setattr(ranks, "agree", told.append)
    assert ranks.by_first(lambda: (ranks.world(), ranks.rank())) == (1, 0)
    with pytest.raises(LillamaError, match="no"):
        ranks.by_first(lambda: fail(LillamaError("no")))
    assert told == [((1, 0), None), (None, "no")]
    assert ranks.world() == 2


def fail(error):
    raise error


def test_a_launcher_that_starts_one_process_changes_nothing(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.join()
    assert ranks.world() == 1 and ranks.local() is None
    assert "RANK" not in os.environ, "transformers' Trainer would take itself for one of several"
