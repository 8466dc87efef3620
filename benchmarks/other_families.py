"""Families that differ from the decoder of the quickstart, 20 % smaller and in few bits: what 8 and 4 bits cost each.

    python benchmarks/other_families.py
    python benchmarks/other_families.py --only whisper --whisper DIR --speech DATASET --heard DATASET

A small Mixtral and a small Mamba are trained here from nothing, on the text of Python's help; then a run of the
project's recipe removes 20 % of the parameters, learns from the original's predictions, and ends in 8, then in 4 bits.
A Whisper is given: 20 % of its decoder's linears go, `--speech` calibrates, `--heard` (with transcripts) measures:
words that are wrong, and the perplexity of the transcripts' tokens, each read after the true ones. All runs are kept
below --out, where the command goes on. About 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lillama_mamba.scan import use_linear_scan
from torch import Tensor
from train_tiny_mamba import new_mamba, new_tokenizer, train
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import lillama
from lillama.base import quiet
from lillama.base.progress import Progress
from lillama.base.rundir import FINETUNED, MODEL, ORIGINAL, QUANTIZED
from lillama.data.text import token_blocks
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import perplexity
from lillama.pretrained.locate import read_processor
from lillama.recipe.schema import Calibration

RECIPES = Path(__file__).parents[1] / "recipes"
ALLOWED = {8: 1.005, 4: 1.10}  # times the perplexity in 16 bits
LENGTH = 128  # tokens of a sequence

Measure = Callable[[Any], dict[str, float]]


def new_mixtral(width: int, layers: int, vocabulary: int) -> MixtralForCausalLM:
    """A Mixtral of eight experts, two of which read a token, randomly initialised."""
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1),
        num_key_value_heads=max(width // 64, 1),
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        output_router_logits=True,  # while it learns, for the loss that spreads tokens over the experts
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


NEW: dict[str, Callable[[int, int, int], Any]] = {"mixtral": new_mixtral, "mamba": partial(new_mamba, state=8)}


def make_original(family: str, place: Path, args: argparse.Namespace) -> None:
    """Train a small model from nothing, unless it is there."""
    if (place / "config.json").exists():
        return
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer(args.text, args.learned, args.vocabulary)
    model = NEW[family](args.width, args.layers, len(tokenizer))
    print(f"{family}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokens_of(tokenizer, args.text, args.learned), args)
    if family == "mixtral":
        model.config.output_router_logits = False
    tokenizer.save_pretrained(place)
    model.save_pretrained(place)


def tokens_of(tokenizer: Any, text: str, split: str) -> Tensor:
    """The tokens of a text, in blocks put one after another."""
    return token_blocks(tokenizer, Calibration(dataset=text, split=split, sequence_length=LENGTH)).flatten()


def unigram(tokenizer: Any, args: argparse.Namespace) -> float:
    """The perplexity of who only knows how often each token comes (counts of the text learned from, one added)."""
    learned, held = (tokens_of(tokenizer, args.text, split) for split in (args.learned, args.held_out))
    shares = torch.bincount(learned, minlength=len(tokenizer)).double() + 1
    return math.exp(-(shares / shares.sum()).log()[held].mean().item())


def of_text(place: Path, args: argparse.Namespace) -> Measure:
    """How a language model is measured."""
    context = Context(AutoTokenizer.from_pretrained(place), "cpu")
    told = {"dataset": args.text, "split": args.held_out, "sequence_length": LENGTH, "tokens": args.tokens}
    return lambda model: {"perplexity": perplexity(model, context, **told)["perplexity"]}


def of_speech(recipe: lillama.Recipe, args: argparse.Namespace) -> Measure:
    """How a Whisper is measured: the tokens of the transcripts, and the words that it writes itself."""
    from lillama_whisper.data import finetune_examples

    from lillama.evaluate.speech import wer

    asked = recipe.model_copy(
        update={"finetune": recipe.finetune.model_copy(update={"dataset": args.heard, "augment": 0, "variants": 0})}
    )
    examples = finetune_examples(asked, Progress())
    context = Context(read_processor(recipe.model.id, False), "cpu")

    @torch.no_grad()
    def measure(model: Any) -> dict[str, float]:
        lost = count = 0.0
        for example in examples:
            states, read, labels = example["encoder_outputs"][0], example["decoder_input_ids"], example["labels"]
            logits = model(encoder_outputs=(states[None].float(),), decoder_input_ids=read[None]).logits[0]
            lost += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            count += (labels >= 0).sum().item()
        most = min(224, model.config.max_target_positions - 4)  # what is read before the first word
        found = wer(model, context, dataset=args.heard, new_tokens=most, speed_tokens=0)
        return {"perplexity": math.exp(lost / count), "wer": found["wer"]}

    return measure


def recipe_of(family: str, place: Path, out: Path, args: argparse.Namespace) -> lillama.Recipe:
    """The run that removes 20 %: the quickstart's recipe, or the best one of Whisper's decoder, for small models."""
    changes = [f"model.id={json.dumps(str(place))}", f"run.out={json.dumps(str(out))}", "run.compute=float32"]
    if family == "whisper":
        changes += ["compress.reduction=0.2", f"calibration.dataset={json.dumps(args.speech)}", "finetune.hours=null"]
        changes += ["calibration.fraction=1.0", f"finetune.steps={args.updates}"]
    else:
        changes += [f"{section}.sequence_length={LENGTH}" for section in ("calibration", "finetune")]
        changes += [f"calibration.dataset={args.text}", f"calibration.split={args.learned}"]
        changes += [f"finetune.steps={args.updates}", "finetune.batch_size=4", "finetune.learning_rate=3e-4"]
    file = RECIPES / ("whisper_decoder70_best.yaml" if family == "whisper" else "quickstart.yaml")
    # By ranks alone, as the figures in docs/results are: experts and Mamba's blocks have no neurons to remove.
    recipe = lillama.Recipe.load(file, [*changes, "compress.neurons=null", *args.set])
    return recipe.model_copy(update={"evaluate": {}})


def loaded(place: Path) -> Any:
    """A checkpoint, or the original, in float32."""
    model = lillama.load(place, dtype=torch.float32).eval()
    use_linear_scan(model)
    return model


def family_points(family: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The original, the result of low rank and that in few bits, each measured."""
    out = args.out / family
    place = args.whisper if family == "whisper" else args.out / f"{family}_original"
    if family != "whisper":
        make_original(family, place, args)
    recipe = recipe_of(family, place, out, args)
    lillama.compress(recipe, progress=Progress())
    measure = of_speech(recipe, args) if family == "whisper" else of_text(place, args)
    original = out / ORIGINAL if (out / ORIGINAL).is_dir() else place
    found = [{"family": family, "what": "original", "bits": 16, **measure(open_original(family, original))}]
    smaller = measure(loaded(out / (FINETUNED if recipe.finetune else MODEL)))
    found.append({"family": family, "what": "20 % removed", "bits": 16, **smaller})
    for bits in ALLOWED:
        shutil.rmtree(out / QUANTIZED, ignore_errors=True)
        few = lillama.Recipe.parse({**recipe.model_dump(), "quantize": {"bits": bits, **json.loads(args.quantize)}})
        lillama.compress(few, progress=Progress())
        point = {"family": family, "what": "20 % removed", "bits": bits, **measure(loaded(out / QUANTIZED))}
        point["ratio"] = point["perplexity"] / smaller["perplexity"]
        found.append(point)
    if family != "whisper":
        found[0]["unigram"] = unigram(AutoTokenizer.from_pretrained(place), args)
    for point in found:
        print(json.dumps(point), flush=True)
    return found


def open_original(family: str, place: Path) -> Any:
    """The model that was compressed, in float32."""
    from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

    auto = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForCausalLM
    model = auto.from_pretrained(place, dtype=torch.float32).eval()
    use_linear_scan(model)
    return model


def table(points: list[dict[str, Any]]) -> str:
    """All points, and whether few bits cost no more than is allowed."""
    lines = ["| | bits | perplexity | x the 16-bit one | allowed | WER |", "|---|---|---|---|---|---|"]
    for point in points:
        ratio = f"{point['ratio']:.4f} | {ALLOWED[point['bits']]}" if "ratio" in point else " | "
        words = f"{point['wer']:.1%}" if "wer" in point else ""
        name = f"{point['family']}, {point['what']}"
        lines.append(f"| {name} | {point['bits']} | {point['perplexity']:.3f} | {ratio} | {words} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What 8 and 4 bits cost a Mixtral, a Mamba and a Whisper.")
    parser.add_argument("--only", default="mixtral,mamba", help="families, with commas")
    parser.add_argument("--text", default="package:pydoc_data.topics")
    parser.add_argument("--learned", default="train[:80%]", help="split to learn from and to calibrate on")
    parser.add_argument("--held-out", default="train[80%:]", help="split to measure on")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=700, help="updates of the originals")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens per sequence of these updates")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--updates", type=int, default=60, help="updates after ranks were removed")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens to measure on")
    parser.add_argument("--whisper", type=Path, help="directory of a Whisper, for --only whisper")
    parser.add_argument("--speech", help="speech that calibrates it")
    parser.add_argument("--heard", help="speech with transcripts that it is measured on")
    parser.add_argument("--quantize", default="{}", help="more of the section quantize, as JSON")
    parser.add_argument("--set", action="append", default=[], help="of the recipe: dotted.key=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    args = parser.parse_args()
    quiet.quiet_libraries()
    points = [point for family in args.only.split(",") for point in family_points(family, args)]
    print(table(points))
    (args.out / "table.md").write_text(table(points) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
