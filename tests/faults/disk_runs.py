"""Small real runs whose directory is looked at all the time: the most it held, beside what was estimated.

python tests/faults/disk_runs.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from conftest import WORDS, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lillama.base.progress import Progress
from lillama.recipe.schema import Recipe
from lillama.report import html
from lillama.run import disk, pipeline, prepare
from lillama.run.counts import Counts
from lillama.testing import recipe_for

COMMON = ("calibration.tokens=2048", "calibration.sequence_length=64", "calibration.dataset={home}/text.txt")
FINETUNE = "finetune={steps: 4, checks: 4, batch_size: 2, sequence_length: 64, tokens: 1024}"
RUNS: dict[str, tuple[str, ...]] = {
    "one by one": ("compress.strategy=fisher", "compress.init=fisher", "compress.storage=pivoted"),
    "one by one, streams in files": (
        *("compress.strategy=fisher", "compress.init=fisher", "distill.train=layer", "distill.loss=student"),
        *("run.stream_memory=0", "run.low_memory=true"),
    ),
    "all at once": ("distill.schedule=concurrent", "distill.train=layer", "run.snapshot_seconds=0"),
    "all at once, low memory": ("distill.schedule=concurrent", "run.snapshot_seconds=0", "run.low_memory=true"),
    "fine-tuned": (FINETUNE, "compress.storage=pivoted"),
    "fine-tuned, little of it": (FINETUNE, "finetune.freeze=['*mlp*', '*embed*']", "finetune.checks=1"),
    "adapters": (FINETUNE, "finetune.lora.rank=4"),
}


def build(home: Path) -> None:
    """A model of 6 million parameters and its text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=2000, pad_token_id=0, eos_token_id=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (6000,), generator=generator).tolist()
    (home / "text.txt").write_text("\n".join(" ".join(WORDS[i] for i in drawn[n : n + 8]) for n in range(0, 6000, 8)))


def recipe(home: Path, overrides: tuple[str, ...]) -> Recipe:
    """The recipe of a run in a folder of its own."""
    out = Path(tempfile.mkdtemp(dir=home)) / "run"
    settings: Any = recipe_for(home / "model", out, changes={"compress.reduction": 0.4}).model_dump(mode="json")
    return Recipe.parse(settings, [one.replace("{home}", str(home)) for one in (*COMMON, *overrides)])


def held(place: Path) -> int:
    """Bytes of all files in a folder that others write to."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118  # as fast as can be
            except OSError:
                continue
    return total


def peak(asked: Recipe) -> tuple[int, int]:
    """(bytes estimated, the most that was seen) of a run."""
    prepared = prepare.prepare(asked)
    estimated = disk.needed(Counts(prepared.source, prepared.plan, asked, prepared.device))
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(held(Path(asked.run.out)))
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        pipeline.Run(prepared, Progress()).execute()
    finally:
        done.set()
        watcher.join()
    return estimated, max(seen)


if __name__ == "__main__":
    html.write = lambda path: path / "report.html"  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for name in sys.argv[1:] or RUNS:
            estimated, most = peak(recipe(Path(folder), RUNS[name]))
            own = estimated - disk.BESIDE
            sys.stdout.write(f"{name}: estimated {own / 1e6:.1f} MB, seen {most / 1e6:.1f} MB, x {own / most:.2f}\n")
            sys.stdout.flush()
