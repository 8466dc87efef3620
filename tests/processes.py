"""Runs that one process and several must end with the same weights; as a script, what the launcher starts several of.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/processes.py HOME NAME...

It runs the cases named (`prepare` has made their models) into HOME/NAME/together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import families
import speech_models
import torch
from conftest import WORDS, tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import lillama
from lillama.base import ranks
from lillama.base.progress import Progress
from lillama.recipe.schema import Recipe
from lillama.testing import recipe_for, token_batches

SEQUENTIAL = {"distill.schedule": "sequential"}
CONCURRENT = {"distill.schedule": "concurrent"}
FISHER = {"compress.strategy": "fisher", "compress.init": "fisher", "compress.fisher_tokens": 100}
WITHOUT_QK = {"compress.skip": ["*q_proj", "*k_proj"], "distill.learning_rate": 3e-4}
TUNED = {"steps": 3, "batch_size": 3, "sequence_length": 12, "tokens": 240, "checks": 2, "learning_rate": 1e-4}
FEW = {"bits": 8, "steps": 0}
# family, rows of a batch, changes of the recipe. Where there are no calibration batches the data are a folder's.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    # Updates of one row, which is one process's: the other makes the original's predictions. Queries and keys stay
    # dense: gradients of theirs are so small here that the optimiser makes much of rounding.
    "llama": (
        "llama",
        3,
        {**SEQUENTIAL, **FISHER, **WITHOUT_QK, "finetune": {**TUNED, "batch_size": 1, "teacher": 0.5, "average": 0.0}},
    ),
    "llama-concurrent": ("llama", 2, {**CONCURRENT, **FISHER, "distill.clip_norm": 1.0}),
    # Grams, the tied embedding, layers that learn as a whole; updates of one row are one process's.
    "llama-grams": (
        "llama",
        2,
        {**SEQUENTIAL, "compress.embedding": True, "distill.train": "layer", "finetune": {**TUNED, "batch_size": 1}},
    ),
    # Nothing is trained: layers are finished apart. Then few bits, by moments.
    "llama-apart": (
        "llama",
        2,
        {
            **SEQUENTIAL,
            **FISHER,
            "distill.epochs": 0,
            "compress.storage": "pivoted",
            "quantize": FEW,
        },
    ),
    # Neurons go: the widths of MLPs are tried apart, and what is left of a weight is made by all.
    "llama-neurons": (
        "llama",
        2,
        {
            **SEQUENTIAL,
            **FISHER,
            "compress.neurons": 0.5,
            **WITHOUT_QK,
            "compress.reduction": 0.4,
        },
    ),
    # Each process has a part of every block; updates of one row, of which the other process runs one along.
    "llama-divided": (
        "llama",
        2,
        {
            **SEQUENTIAL,
            "compress.embedding": True,
            "compress.storage": "pivoted",
            "run.divide": True,
            "finetune": {
                **TUNED,
                "batch_size": 1,
                "gradient_accumulation": 2,
                "teacher": 0.5,
                "holdout": 0.2,
                "average": 0.3,
            },
        },
    ),
    "llama-adapters": (
        "llama",
        2,
        {**SEQUENTIAL, "compress.storage": "pivoted", "run.divide": True, "finetune": {**TUNED, "lora": {"rank": 4}}},
    ),
    "mixtral-divided": ("mixtral", 2, {**SEQUENTIAL, "distill.loss": "student", "run.divide": True, "finetune": TUNED}),
    "mamba-divided": ("mamba", 2, {**SEQUENTIAL, **FISHER, "run.divide": True, "finetune": {**TUNED, "teacher": 1.0}}),
    "whisper-divided": ("whisper", 2, {**SEQUENTIAL, **FISHER, "run.divide": True, "finetune": TUNED}),
    "mixtral": ("mixtral", 2, {**SEQUENTIAL, "distill.loss": "student", "finetune": TUNED}),
    "mixtral-concurrent": ("mixtral", 1, {**CONCURRENT, **FISHER}),  # a batch has fewer rows than there are processes
    "mamba": ("mamba", 2, {**SEQUENTIAL, **FISHER, "finetune": {**TUNED, "batch_size": 2, "gradient_accumulation": 2}}),
    "mamba-concurrent": ("mamba", 3, {**CONCURRENT, **FISHER}),
    "whisper": ("whisper", 2, {**SEQUENTIAL, **FISHER, "finetune": {**TUNED, "batch_size": 2}}),
    "whisper-concurrent": ("whisper", 2, {**CONCURRENT, **FISHER}),
}


def prepare(home: Path, name: str) -> None:
    """Make the model of a case and its data below `home/NAME`."""
    place, family = home / name, CASES[name][0]
    place.mkdir(parents=True)
    if family == "whisper":
        speech_models.save(place / "model")
        speech_models.folder(place / "data", 6)
        return
    families.MODELS[family]().eval().save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    drawn = torch.randint(0, len(WORDS), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (place / "data.txt").write_text(" ".join(WORDS[i] for i in drawn))


def recipe_of(home: Path, name: str, out: str) -> Recipe:
    """The recipe of a case, whose run goes to `home/NAME/OUT`."""
    place, (family, rows, changes) = home / name, CASES[name]
    changes = {"compress.reduction": 0.3, "distill.batch_size": rows, **changes}
    sections = {key: changes.pop(key) for key in ("finetune", "quantize") if key in changes}
    recipe = recipe_for(place / "model", place / out, changes=changes)
    settings = recipe.model_dump(mode="json") | sections
    settings["calibration"] |= {
        "dataset": str(place / ("data" if family == "whisper" else "data.txt")),
        "sequence_length": 16,
    }
    if name == "llama":
        about = {"dataset": str(place / "data.txt"), "sequence_length": 16, "batch_size": 2}
        settings["evaluate"] = {"perplexity": about}
    return Recipe.parse(settings)


def batches_of(home: Path, name: str) -> list[dict[str, torch.Tensor]] | None:
    """Random calibration batches of a case; None where its plugin reads a folder."""
    family, rows, _ = CASES[name]
    if family == "whisper":
        return None
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / name / "model"))
    return token_batches(model, batches=7, batch_size=rows, length=16)


def run(home: Path, name: str, out: str) -> dict[str, Any]:
    """Run a case into `home/NAME/OUT`; its metrics."""
    recipe = recipe_of(home, name, out)
    return lillama.compress(recipe, progress=Progress(), batches=batches_of(home, name)).metrics


def metrics(home: Path, name: str, out: str) -> dict[str, Any]:
    """What a run measured."""
    return json.loads((home / name / out / "metrics.json").read_text())


def apart(home: Path, name: str, first: str, second: str) -> dict[str, float]:
    """How far the checkpoints of two runs are from each other: the largest difference over the largest number.

    Which way a number is rounded may hang on its last bit, and others make up for it: of codes most are to be the same.
    """
    found = {}
    for path in sorted((home / name / first).glob("*/model.safetensors")):
        mine, theirs = load_file(path), load_file(home / name / second / path.parent.name / path.name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            if key.endswith("_scale"):
                continue  # those of codes
            if key.endswith("_codes"):
                assert (tensor == theirs[key]).float().mean() > 0.8, key
            elif not tensor.is_floating_point():
                assert torch.equal(tensor, theirs[key]), key
            elif tensor.numel():
                gap = (tensor.float() - theirs[key].float()).abs().max() / tensor.abs().max().clamp_min(1e-30)
                found[f"{path.parent.name}/{key}"] = float(gap)
    return found


def main() -> int:
    """Run the cases together with the other processes that the launcher started."""
    home = Path(sys.argv[1])
    ranks.join()
    for name in sys.argv[2:]:
        run(home, name, "together")
        if ranks.is_first():
            sys.stdout.write(f"{name} is done\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
