"""Train a tiny Mamba on real text, from nothing, as an original to compress: `lillama run` opens what this saves.

    python benchmarks/train_tiny_mamba.py --out runs/tiny_mamba
    python benchmarks/train_tiny_mamba.py --text train.txt --split train --held-out test.txt --held-out-split train

Byte-level BPE with a small vocabulary, AdamW with a cosine, the plugin's linear scan.
About 20 minutes on one core that is shared.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from lillama_mamba.scan import use_linear_scan
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from lillama.data.render import render_rows
from lillama.data.rows import load_rows
from lillama.data.text import token_blocks
from lillama.evaluate.perplexity import score
from lillama.recipe.schema import Calibration

END = "<|endoftext|>"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_mamba"), help="directory to save the model in")
    parser.add_argument("--text", default="package:pydoc_data.topics", help="text to train on: file or package:MODULE")
    parser.add_argument("--split", default="train[:80%]")
    parser.add_argument("--held-out", default="package:pydoc_data.topics", help="text to measure on")
    parser.add_argument("--held-out-split", default="train[80%:]")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_tokenizer(text: str, split: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training text alone."""
    rows = load_rows(text, split=split, where="--text")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(render_rows(rows, None, None, "--text"), vocabulary, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def new_mamba(width: int, layers: int, vocabulary: int, state: int = 4) -> MambaForCausalLM:
    """A Mamba of the published proportions but for its state, randomly initialised."""
    config = MambaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=state,
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MambaForCausalLM(config)
    use_linear_scan(model)
    return model


def train(model: MambaForCausalLM, ids: Tensor, options: argparse.Namespace) -> None:
    """Windows of `ids` [tokens] at random offsets; norms, biases and the scan's own parameters do not decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "A_log" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = max(options.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
    )
    start, mean = time.perf_counter(), math.log(model.config.vocab_size)
    model.train()
    for step in range(1, options.steps + 1):
        offsets = torch.randint(len(ids) - options.length, (options.batch_size,))
        batch = torch.stack([ids[o : o + options.length] for o in offsets.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 100 == 0:
            speed = step * batch.numel() / (time.perf_counter() - start)
            print(f"step {step:5d}  loss {mean:.3f}  {speed:,.0f} tokens/s", flush=True)


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    tokenizer = new_tokenizer(options.text, options.split, options.vocabulary)

    def blocks(dataset: str, split: str) -> Tensor:
        return token_blocks(tokenizer, Calibration(dataset=dataset, split=split, sequence_length=options.length))

    text, held_out = blocks(options.text, options.split), blocks(options.held_out, options.held_out_split)
    model = new_mamba(options.width, options.layers, len(tokenizer))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {text.numel():,} tokens to train on, {held_out.numel():,} held out")
    train(model, text.flatten(), options)
    perplexity = score(model, held_out[:128], 8, "cpu")["perplexity"]
    print(f"held-out perplexity {perplexity:.3f} per token ({len(tokenizer)} tokens in the vocabulary)")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved in {options.out}")


if __name__ == "__main__":
    main()
