"""What lillama does on one GPU, in ten minutes: a table, and gpu.json beside it. **Not run on a GPU yet.**

    python benchmarks/gpu.py                  # from a checkout, on one card (80 GB are enough), within 10 minutes
    python benchmarks/gpu.py --dry            # tiny shapes on the CPU: whether the script itself works
    python benchmarks/gpu.py --parts layers,speed --out here.json

Models have the published shapes and random weights that are made on the device; of a deep one a few layers are built,
since the sequential schedule never has more than one at a time. Nothing is downloaded. Parts:

- contract: what every architecture is promised (lillama/testing/contract.py), with runs on the card;
- layers: the default recipe on a few layers of Phi-2, Mistral-7B and Mixtral-8x7B: the peak of device memory beside the
  estimate, seconds per layer and phase, and what the whole model would take, beside the paper's minutes on an A100;
- speed: prefill and decode at batch 4, dense and pivoted, eager and compiled; 1.00 of the numbers' ratio means that a
  model of fewer numbers is faster by as much.

Every part has its share of the time and is caught by itself: what fails or is cut off is said, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"pyyaml": "yaml"}  # packages whose module has another name
SPARE = ("datasets", "gguf", "matplotlib")  # asked for by lillama, but not by anything here
SECONDS = {"contract": 130.0, "layers": 290.0, "speed": 150.0}  # of ten minutes; the rest is imports
PAPER = {"mistral-7b": 26, "mixtral-8x7b": 47}  # minutes on an A100 80 GB, of the whole compression
TOKENS = 13_000_000  # that the paper calibrates on
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PHASES = ("read", "statistics", "factorise", "distil", "store")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published model: its class's configuration, how many layers it has, and how many are built here."""

    config: str
    layers: int
    built: int
    sizes: dict[str, Any]


ATTENTION = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "phi-2": Shape("PhiConfig", 32, 2, {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32,
                                        "vocab_size": 51200, "partial_rotary_factor": 0.4}),
    "mistral-7b": Shape("MistralConfig", 32, 2, {**ATTENTION, "vocab_size": 32000}),
    "mixtral-8x7b": Shape("MixtralConfig", 32, 1, {**ATTENTION, "vocab_size": 32000, "num_local_experts": 8}),
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 97}


@dataclasses.dataclass
class Bench:
    """Where and how large everything is, and what was found; `dry`: tiny, on the CPU."""

    device: str
    dry: bool
    folder: Path
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def row(self, *cells: Any) -> None:
        """A line of the table, said at once."""
        self.rows.append(tuple(str(cell) for cell in cells))
        print(" | ".join(self.rows[-1]), flush=True)


def missing_packages() -> list[str]:
    """What lillama needs and this environment lacks, by the names under which pip knows them."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [entry.partition(">")[0].strip() for entry in asked]
    return [n for n in names if n not in SPARE and importlib.util.find_spec(MODULES.get(n, n)) is None]


def use_checkout(folder: Path) -> None:
    """Have this process, and those it starts, import lillama and find its plugins where it was not installed."""
    places = [str(ROOT), str(ROOT / "plugins")]
    sys.path[:0] = places
    if not importlib.metadata.entry_points(group="lillama"):
        points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
        said = folder / "lillama-0.dist-info"
        said.mkdir()
        (said / "METADATA").write_text("Metadata-Version: 2.1\nName: lillama\nVersion: 0\n")
        lines = [f"{name} = {module}" for name, module in points["lillama"].items()]
        (said / "entry_points.txt").write_text("\n".join(["[lillama]", *lines, ""]))
        sys.path.insert(0, str(folder))
        places.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    os.environ["HF_HUB_OFFLINE"] = "1"


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the block once it took that long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_config(name: str, bench: Bench, built: int | None = None) -> Any:
    """The configuration of a shape, of fewer layers."""
    import transformers

    shape = SHAPES[name]
    sizes = {**shape.sizes, **(TINY if bench.dry else {})}
    if "num_key_value_heads" in sizes and bench.dry:
        sizes["num_key_value_heads"] = 2
    kind = getattr(transformers, shape.config)
    config = kind(**sizes, num_hidden_layers=built or shape.built, max_position_embeddings=32768, pad_token_id=0)
    config.dtype = "float32" if bench.dry else "bfloat16"
    config.tie_word_embeddings = False
    return config


def make_model(config: Any, bench: Bench) -> Any:
    """A model of random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, str(config.dtype).split(".")[-1]))
    return model.eval().requires_grad_(False)


def give_back() -> None:
    """Free what only points at itself, and the card's cache."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The contract


def contract(bench: Bench) -> None:
    """Every promise, on the card, for a decoder and for experts."""
    import torch
    from transformers import AutoModelForCausalLM

    from lillama.testing import check_architecture

    for name in ("mistral-7b",) if bench.dry else ("mistral-7b", "mixtral-8x7b"):
        small = Bench(bench.device, True, bench.folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(name, small, 2)).float()
        start = time.perf_counter()
        storages = ["pivoted"] if bench.dry else None
        try:
            check_architecture(model, bench.folder / f"contract-{name}", storages=storages, device=bench.device)
            said = "kept"
        except AssertionError as error:
            said = f"broken: {error}"
        seconds = time.perf_counter() - start
        bench.found.setdefault("contract", {})[name] = {"result": said, "seconds": seconds}
        bench.row("contract", name, said, f"{seconds:.0f} s")


# Layers: memory and seconds


class Clock:
    """Seconds that functions take by the phase they belong to, less those of other phases inside of them."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self._inside = device, dict.fromkeys(PHASES, 0.0), [0.0]

    def now(self) -> float:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `phase`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                took = self.now() - start
                self.seconds[phase] += took - self._inside.pop()
                self._inside[-1] += took

        return run

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time the engine while the block lasts."""
        from lillama.checkpoint import write
        from lillama.distill import sequential
        from lillama.distill.job import Job
        from lillama.factorise import grams, sensitivity
        from lillama.pretrained.source import Source
        from lillama.pretrained.walk import Walk

        watched = [
            ("read", Source, "materialise"),
            ("statistics", sensitivity, "measure_spectra"),
            ("statistics", grams.Grams, "add"),
            ("factorise", sequential, "initial_factors"),
            ("distil", sequential._Step, "_train"),
            ("distil", Walk, "run_through"),
            ("store", Job, "store"),
            ("store", write, "write"),
        ]
        before = [getattr(owner, name) for _, owner, name in watched]
        for phase, owner, name in watched:
            setattr(owner, name, self.timed(phase, getattr(owner, name)))
        try:
            yield
        finally:
            for (_, owner, name), function in zip(watched, before):
                setattr(owner, name, function)


def layers(bench: Bench) -> None:
    """Peaks beside estimates, and seconds per layer and phase, of the default recipe."""
    for name in SHAPES:
        try:
            _compress(name, bench)
        except TimeoutError:
            raise
        except Exception as error:  # the next shape may well run
            bench.found.setdefault("layers", {})[name] = {"error": repr(error)[:300]}
            bench.row("layers", name, f"failed: {error!r}"[:160])
        give_back()


def _compress(name: str, bench: Bench) -> None:
    import torch

    from lillama.base.progress import Progress
    from lillama.recipe.schema import Recipe
    from lillama.run import estimate, pipeline, prepare

    shape, home = SHAPES[name], bench.folder / name
    model = make_model(make_config(name, bench), bench)
    model.save_pretrained(home / "model")
    count, length, batch = (4, 16, 2) if bench.dry else (48, 1024, 8)
    ids = torch.randint(3, model.config.vocab_size, (count, batch, length))
    del model
    give_back()
    recipe = Recipe.parse({
        "model": {"id": str(home / "model")},
        "compress": {"reduction": 0.2, "of": "weights", **({"rank_multiple": 2} if bench.dry else {})},
        "distill": {"batch_size": batch, "schedule": "sequential"},
        "calibration": {"dataset": "given", "tokens": ids.numel(), "sequence_length": length},
        "run": {"out": str(home / "run"), "device": bench.device},
    })  # fmt: skip
    prepared, card = prepare.prepare(recipe), bench.device.startswith("cuda")
    expected = estimate.estimate(prepared.source, prepared.plan, prepared.recipe, prepared.device)
    give_back()
    if card:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(bench.device)
    start = time.perf_counter()
    with clock.watching():
        pipeline.Run(prepared, Progress(), batches=[{"input_ids": one} for one in ids]).execute()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if card else None
    each = {phase: took / shape.built for phase, took in clock.seconds.items()}
    # What learns grows with the tokens; all else is done once a layer. The paper's 13 million, of all layers.
    whole = shape.layers * (sum(each.values()) + each["distil"] * (TOKENS / ids.numel() - 1)) / 60
    bench.found.setdefault("layers", {})[name] = {
        "built": shape.built, "layers": shape.layers, "tokens": ids.numel(), "seconds": seconds, "per_layer": each,
        "peak_bytes": peak, "estimated_bytes": expected.memory, "projected_minutes": whole,
        "paper_minutes": PAPER.get(name),
    }  # fmt: skip
    memory = "no card" if peak is None else f"{peak / 2**30:.1f} GiB, x {expected.memory / peak:.2f}"
    paper = f"paper {PAPER[name]} min" if name in PAPER else "not in the paper"
    phases = ", ".join(f"{phase} {took:.2f}" for phase, took in each.items())
    total = "tiny" if bench.dry else f"whole {whole:.0f} min"
    bench.row("layers", name, f"s per layer: {phases}", f"peak (estimate): {memory}", f"{total}; {paper}")


# Speed


def speed(bench: Bench) -> None:
    """Prefill and decode, dense and pivoted, eager and compiled."""
    import torch

    from lillama.checkpoint.quantizer import place_factors
    from lillama.contract import Layer
    from lillama.lowrank.swap import factor_modules, lay_out
    from lillama.plan.plan import choose_ranks
    from lillama.recipe.schema import Compress

    config = make_config("mistral-7b", bench, 2 if bench.dry else 4)
    dense, small = make_model(config, bench), make_model(config, bench)
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    listed = [Layer.of_linears(small, f"model.layers.{i}", groups) for i in range(config.num_hidden_layers)]
    wanted = Compress(reduction=0.2, of="weights", strategy="uniform", storage="pivoted")
    place_factors(small, choose_ranks(listed, small.num_parameters(), wanted).modules())
    small.to_empty(device=bench.device) if any(p.is_meta for p in small.parameters()) else small.to(bench.device)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_(std=0.02)
        for _, module in factor_modules(small):
            for buffer in module.buffers():
                buffer.copy_(torch.randperm(module.out_features)[: len(buffer)])
    lay_out(small)
    pair = {"dense": dense, "pivoted": small.to(dense.dtype).eval().requires_grad_(False)}
    numbers = [sum(p.numel() for p in model.model.layers.parameters()) for model in pair.values()]
    bench.found["speed"] = {"numbers_ratio": numbers[0] / numbers[1], "rows": []}
    for length in (8, 16) if bench.dry else LENGTHS:
        for compiled in (False, True):
            _time(pair, length, compiled, bench)


def _time(pair: dict[str, Any], length: int, compiled: bool, bench: Bench) -> None:
    """One row: both models in turn, reading a prompt and then one token."""
    import torch

    batch, rounds = (2, 2) if bench.dry else (4, 5)
    prompt = torch.randint(3, pair["dense"].config.vocab_size, (batch, length), device=bench.device)
    clock, times = Clock(bench.device), {(name, phase): [] for name in pair for phase in ("prefill", "decode")}
    with torch.inference_mode():
        steps = {}
        for name, model in pair.items():
            forward = model.forward
            if compiled:
                forward = torch.compile(forward, dynamic=False, backend="eager" if bench.dry else "inductor")
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            steps[name] = (forward, cache)
        for turn in range(rounds + 1):  # the first warms up, and compiles
            for name in pair if turn % 2 else reversed(pair):
                forward, cache = steps[name]
                start = clock.now()
                forward(prompt, use_cache=False, logits_to_keep=1)
                middle = clock.now()
                # Eager: a token after the prompt. The cache is cut again, so that every token is as far along.
                pair[name](prompt[:, :1], past_key_values=cache, use_cache=True)
                end = clock.now()
                cache.crop(-1)
                if turn:
                    times[name, "prefill"].append(middle - start)
                    times[name, "decode"].append(end - middle)
    found: dict[str, Any] = {"length": length, "compiled": compiled}
    said = []
    for phase in ("prefill", "decode") if not compiled else ("prefill",):
        a, b = times["dense", phase], times["pivoted", phase]
        ratio = statistics.median(x / y for x, y in zip(a, b))
        to = ratio / bench.found["speed"]["numbers_ratio"]
        found[phase] = {
            "dense": statistics.median(a),
            "pivoted": statistics.median(b),
            "ratio": ratio,
            "to_numbers": to,
        }
        said.append(f"{phase} {statistics.median(a) * 1e3:.1f} ms, pivoted x {ratio:.2f} ({to:.2f} of the numbers')")
    bench.found["speed"]["rows"].append(found)
    bench.row("speed", f"{batch} x {length}", "compiled" if compiled else "eager", *said)


PARTS: dict[str, Callable[[Bench], None]] = {"contract": contract, "layers": layers, "speed": speed}


def run_part(name: str, bench: Bench) -> None:
    """One part within its time; whatever it ends with is said."""
    start = time.perf_counter()
    try:
        with at_most(SECONDS[name]):
            PARTS[name](bench)
        said = "done"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    give_back()
    seconds = time.perf_counter() - start
    bench.found.setdefault("parts", {})[name] = {"ended": said, "seconds": seconds}
    bench.row(name, said, f"{seconds:.0f} s")


def environment(device: str) -> dict[str, str]:
    """What it ran on."""
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device.startswith("cuda") else "no GPU"
    return {"device": card, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    if lacking := missing_packages():
        print(f"lillama needs packages that are missing here: {', '.join(lacking)}")
        print(f"install them, and nothing else: pip install --no-deps {' '.join(lacking)}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        use_checkout(Path(folder))
        import torch

        if not args.dry and not torch.cuda.is_available():
            print("there is no CUDA device: --dry tries the script on the CPU")
            return 2
        bench = Bench("cpu" if args.dry else "cuda", args.dry, Path(folder))
        bench.found["environment"] = environment(bench.device)
        print("Not a measurement: tiny shapes on a CPU." if args.dry else bench.found["environment"])
        for name in args.parts.split(","):
            run_part(name, bench)
            args.out.write_text(json.dumps(bench.found, indent=2) + "\n")
    failed = [name for name, part in bench.found["parts"].items() if part["ended"] != "done"]
    print(f"written: {args.out}" + (f"; not done: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
