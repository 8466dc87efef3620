"""Greedy tokens and throughput of a compressed checkpoint in vLLM; run in its environment (docs/serving.md).

    python benchmarks/serving.py reference DIR tokens.json
    python benchmarks/serving.py agree DIR tokens.json [--impl transformers] [--processes 2] [--eager]
    python benchmarks/serving.py speed DIR ORIGINAL [--dtype bfloat16]
    python benchmarks/serving.py held DIR [--dtype bfloat16]

`reference` has transformers generate 32 tokens after each of 64 prompts out of Python's help; `agree` has vLLM do it.
`speed` serves both directories and asks each in turn, five times, for 16 answers at once.
`held` counts the bytes of vLLM's tensors (without dense weights that it packed on a CPU) and of the whole process.
`--prompts N` has fewer of them.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import pydoc_data.topics
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS, NEW, LENGTH = 64, 32, 48
REQUESTS, ROUNDS, ASKED = 16, 5, 32


def prompts(directory: str, number: int, length: int) -> list[list[int]]:
    """Pieces of `length` tokens, each of another topic."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
    return [piece for piece in pieces if len(piece) == length][:number]


def reference(directory: str, target: str, number: int) -> None:
    import torch

    import lillama

    model = lillama.load(directory, dtype=torch.float32).eval()
    found = []
    for prompt in prompts(directory, number, LENGTH):
        ids = torch.tensor([prompt])
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **settings)
        found.append({"prompt": prompt, "tokens": out[0, LENGTH:].tolist()})
    Path(target).write_text(json.dumps(found))


def held(directory: str, dtype: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(directory, dtype=dtype, max_model_len=LENGTH + NEW, enforce_eager=True)

    def count(model: Any) -> int:
        kept = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
        return sum({one.data_ptr(): one.nbytes() for one in kept}.values())

    tensors = sum(llm.apply_model(count))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    print(f"{dtype}: {tensors:,} bytes in tensors; the process has {anonymous.split()[1]} KiB of its own in memory")


def agree(directory: str, tokens: str, impl: str, processes: int, eager: bool, dtype: str) -> None:
    from vllm import LLM, SamplingParams

    known = json.loads(Path(tokens).read_text())
    llm = LLM(
        directory,
        dtype=dtype,
        model_impl=impl,
        tensor_parallel_size=processes,
        max_model_len=LENGTH + NEW,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    outs = llm.generate([{"prompt_token_ids": one["prompt"]} for one in known], greedy, use_tqdm=False)
    got = [list(out.outputs[0].token_ids) for out in outs]
    same = sum(a == b for one, out in zip(known, got) for a, b in zip(one["tokens"], out))
    whole = sum(one["tokens"] == out for one, out in zip(known, got))
    how = "eager" if eager else "compiled"
    print(f"{impl}, {how}, {processes} processes: {same} of {sum(map(len, got))} tokens, {whole} of {len(got)} answers")


def serve(directory: str, dtype: str) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", dtype, "--served-model-name", "model", "--max-model-len", "256"]
    with Path(f"{directory.rstrip('/')}.serve.log").open("wb") as log:
        return subprocess.Popen([*command, "--no-enable-prefix-caching"], stdout=log, stderr=log), port


async def ask(port: int, texts: list[list[int]]) -> float:
    """Tokens per second of REQUESTS answers at once."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        start = time.perf_counter()
        more = {"ignore_eos": True}
        answers = await asyncio.gather(
            *(
                client.completions.create(model="model", prompt=t, max_tokens=ASKED, temperature=0, extra_body=more)
                for t in texts
            )
        )
        return sum(answer.usage.completion_tokens for answer in answers if answer.usage) / (time.perf_counter() - start)


def speed(directory: str, original: str, dtype: str) -> None:
    servers = {name: serve(place, dtype) for name, place in (("original", original), ("compressed", directory))}
    try:
        import httpx

        texts = prompts(directory, REQUESTS, 128)
        for server, port in servers.values():
            while True:
                if server.poll() is not None:
                    raise SystemExit("a server ended: its log is beside the model")
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(2)
            asyncio.run(ask(port, texts))
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(ROUNDS):
            for name, (_, port) in servers.items():
                rates[name].append(asyncio.run(ask(port, texts)))
        for name, found in rates.items():
            print(f"{name}: {statistics.median(found):.1f} tokens/s ({', '.join(f'{r:.1f}' for r in found)})")
        ratios = [c / o for o, c in zip(rates["original"], rates["compressed"])]
        print(f"ratio, in turn: {statistics.median(ratios):.3f} ({', '.join(f'{r:.2f}' for r in ratios)})")
    finally:
        for server, _ in servers.values():
            server.terminate()
            server.wait()


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "agree", "speed", "held"])
    parser.add_argument("directory")
    parser.add_argument("other", nargs="?", default="")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    given = parser.parse_args()
    if given.what == "reference":
        reference(given.directory, given.other, given.prompts)
    elif given.what == "agree":
        agree(given.directory, given.other, given.impl, given.processes, given.eager, given.dtype)
    elif given.what == "held":
        held(given.directory, given.dtype)
    else:
        speed(given.directory, given.other, given.dtype)


if __name__ == "__main__":
    main()
