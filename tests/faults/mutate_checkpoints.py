"""Small checkpoints altered at random, opened in every way: `python tests/faults/mutate_checkpoints.py 500 [SEED]`.

Counted are tracebacks (anything but a LillamaError), files written outside, code that ran, and sealed checkpoints that
`load(verify=True)` takes although something in them differs. All must be none.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 17, 10**6, 10**12, 10**30, 10**400, 0.5, -1.5, 1e300, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "a/b", "someone/kernel", "eager", "relu", "llama", "bert", "whisper",
    "float32",
    "someone/elsewhere--planted.Own", "planted.Own", "pipeline", "LlamaModel", [], {}, [1], ["x"], [None], [[]],
    {"": 0}, {"x": {}}, {"a": [1, {}]}, {"rope_type": "yarn"}, {"quant_method": "awq"}, {"quant_method": "lillama"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
]  # fmt: skip
KEYS = [
    "attn_implementation", "_attn_implementation", "architectures", "auto_map", "model_type", "quantization_config",
    "transformers_weights", "num_labels", "id2label", "tokenizer_class", "text_config", "fusion_config", "dtype",
    "torch_dtype", "_name_or_path", "base_model_tp_plan", "layer_types", "is_encoder_decoder", "custom_generate",
    "name_or_path", "_commit_hash", "output_attentions", "problem_type", "tie_word_embeddings", "return_dict",
]  # fmt: skip
EXTRA = [
    "adapter_config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "preprocessor_config.json", "special_tokens_map.json", "model.safetensors.index.json", "pytorch_model.bin",
    "chat_template.jinja", "lillama.manifest.json", "shard-00001-model-00001-of-00001.safetensors", "added_tokens.json",
]  # fmt: skip


@dataclass
class Figures:
    """What was counted."""

    mutations: int = 0
    refused: int = 0
    opened: int = 0
    tracebacks: list[str] = field(default_factory=list)
    outside: int = 0
    ran: int = 0
    accepted: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def line(self) -> str:
        """All of it in a line."""
        return (
            f"{self.mutations} mutations: {self.opened} opened, {self.refused} refused; {len(self.tracebacks)} "
            f"tracebacks, {self.outside} files written outside, {self.ran} times code ran, {len(self.accepted)} wrong "
            f"models accepted; slowest {self.slowest:.1f} s"
        )

    def bad(self) -> bool:
        """Whether anything happened that must not."""
        return bool(self.tracebacks or self.outside or self.ran or self.accepted)


def originals(home: Path) -> list[Path]:
    """Sealed checkpoints of every kind, and a plain model, each with a tokenizer and code that nobody asked for."""
    from conftest import tiny, tokenizer

    from lillama.checkpoint import seal

    made = []
    for name in CASES:
        made.append(home / name)
        shutil.copytree(GOLDEN / name / "model", made[-1])
    made.append(home / "plain")
    tiny("mistral").save_pretrained(made[-1])
    for directory in made:
        if "whisper" not in directory.name:
            tokenizer().save_pretrained(directory)
        (directory / "planted.py").write_text(f"open({str(home / 'ran')!r}, 'a').close()\nclass Own: pass\n")
        seal.seal(directory)
    return made


def places(held: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in what JSON held."""
    inside = list(held.items()) if isinstance(held, dict) else list(enumerate(held)) if isinstance(held, list) else []
    return [pair for key, value in inside for pair in [(held, key), *places(value)]]


def change_json(file: Path, chance: random.Random) -> str:
    """One value replaced, removed or added; sometimes the whole."""
    held = json.loads(file.read_text())
    what = chance.random()
    value = chance.choice(VALUES)
    if what < 0.04:
        held, said = value, "everything"
    elif what < 0.25 or not places(held):
        said = chance.choice(KEYS)
        held[said] = value
    else:
        container, said = chance.choice(places(held))
        if what < 0.4:
            del container[said]
        elif isinstance(container, dict) and what < 0.45:
            container[f"{said}x"] = container.pop(said)
        else:
            container[said] = value
    file.write_text(json.dumps(held))
    return f"{file.name}: {said} {str(value)[:40]}"


def change_bytes(file: Path, chance: random.Random) -> str:
    """Bytes flipped, cut off, added or put elsewhere."""
    data = bytearray(file.read_bytes())
    place = chance.randrange(max(len(data), 1)) if chance.random() < 0.5 else chance.randrange(min(len(data), 400) or 1)
    what = chance.choice(["flip", "cut", "add", "insert", "empty"])
    if what == "flip" and data:
        data[place] ^= 1 << chance.randrange(8)
    elif what == "cut":
        del data[place:]
    elif what == "add":
        data += bytes(chance.randrange(1, 99))
    elif what == "insert":
        data[place:place] = bytes(chance.randrange(1, 9))
    else:
        data.clear()
    file.write_bytes(data)
    return f"{file.name}: {what} at {place}"


def change_header(file: Path, chance: random.Random) -> str:
    """A safetensors header with one thing changed, its length kept right."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    container, key = chance.choice(places(header))
    if chance.random() < 0.3:
        del container[key]
    elif chance.random() < 0.2 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container[key] = chance.choice([*VALUES[:20], "F16", "I8", "F32", [4, 4], [0, 8], [2**62, 4]])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header of {file.name}: {key}"


def split_up(directory: Path, chance: random.Random) -> str:
    """Weights under another name, with an index that may be wrong."""
    from safetensors import safe_open

    weights = directory / "model.safetensors"
    with safe_open(weights, "pt") as opened:
        names = list(opened.keys())
    weights.rename(directory / "model-00001-of-00001.safetensors")
    index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    container, key = chance.choice([(index, "weight_map"), *((index["weight_map"], name) for name in names)])
    container[key] = chance.choice([*VALUES, "../plain/model.safetensors", "config.json", "planted.py"])
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"index: {key} {str(container[key])[:40]}"


def add_file(directory: Path, chance: random.Random) -> str:
    """A file that libraries look for."""
    name = chance.choice(EXTRA)
    file = directory / name
    options = [b"", b"{}", b"[]", b"\xff\xfe", b"x", b'{"auto_map": {"AutoTokenizer": ["planted.Own", null]}}']
    options += [json.dumps({chance.choice(KEYS): chance.choice(VALUES)}).encode(), b'{"weight_map": {}}', b"[" * 50_000]
    file.unlink(missing_ok=True)
    file.write_bytes(chance.choice(options))
    return f"extra {name}"


def mutate(directory: Path, chance: random.Random) -> str:
    """One change to a checkpoint; what it was."""
    what, weights = chance.random(), directory / "model.safetensors"
    if what < 0.4:
        return change_json(directory / "config.json", chance)
    if what < 0.58:
        return change_header(weights, chance)
    if what < 0.66:
        return split_up(directory, chance)
    if what < 0.78:
        return add_file(directory, chance)
    files = sorted(f for f in directory.iterdir() if f.suffix != ".py")
    if what < 0.86:
        chosen = [f for f in files if f.suffix == ".json" and f.name != "config.json"]
        return change_json(chance.choice(chosen), chance)
    return change_bytes(chance.choice(files), chance)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory; new code that libraries may keep for themselves aside."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def ways(directory: Path, target: Path, chance: random.Random) -> dict[str, Callable[[], Any]]:
    """Everything that opens a checkpoint."""
    import lillama
    from lillama.base.progress import Progress
    from lillama.checkpoint.export import export_dense
    from lillama.checkpoint.open import find_plugin, open_model
    from lillama.cli.verify import verify
    from lillama.pretrained.locate import read_processor

    found = {
        "load": lambda: lillama.load(directory),
        "load verified": lambda: lillama.load(directory, verify=True),
        "open_model": lambda: open_model(directory),
        "find_plugin": lambda: find_plugin(directory, None),
        "read_processor": lambda: read_processor(directory),
        "verify": lambda: verify(directory, Progress()),
        "plan": lambda: _planned(directory, target),
        "verify unsealed": lambda: verify(_unsealed(directory), Progress()),
    }
    if chance.random() < 0.3:
        found["export"] = lambda: export_dense(directory, target)
    return found


def _planned(directory: Path, target: Path) -> None:
    """What `run` does of a model before it reads a weight."""
    from lillama.run.prepare import prepare
    from lillama.testing import recipe_for

    prepare(recipe_for(directory, target)).source.fetch(target)


def _unsealed(directory: Path) -> Path:
    (directory / "lillama.manifest.json").unlink(missing_ok=True)
    return directory


def attempt(name: str, act: Callable[[], Any], said: str, figures: Figures) -> bool:
    """Whether `act` came to its end; a traceback is counted."""
    from lillama import LillamaError

    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            act()
    except LillamaError:
        return False
    except Exception:
        figures.tracebacks.append(f"{name} after {said}\n{traceback.format_exc()}")
        return False
    finally:
        figures.slowest = max(figures.slowest, time.monotonic() - began)
    return True


def run(count: int, seed: int = 0) -> Figures:
    """Mutate `count` times, and try everything each time."""
    from lillama.base.quiet import quiet_libraries

    quiet_libraries()
    chance, figures = random.Random(seed), Figures()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        made = originals(home / "originals")
        for number in range(count):
            original = chance.choice(made)
            here = home / "box"
            shutil.copytree(original, here / "model")
            before = contents(here / "model")
            said = f"{original.name}, {mutate(here / 'model', chance)} (number {number})"
            now = contents(here / "model")
            for name, act in ways(here / "model", here / "dense", chance).items():
                ended = attempt(name, act, said, figures)
                figures.opened += ended
                figures.refused += not ended
                if name == "load verified" and ended and now != before:
                    figures.accepted.append(said)
            now.pop("lillama.manifest.json", None)
            figures.outside += contents(here / "model") != now
            figures.outside += not {path.name for path in here.iterdir()} <= {"model", "dense"}
            figures.ran += (home / "originals" / "ran").exists()
            (home / "originals" / "ran").unlink(missing_ok=True)
            shutil.rmtree(here)
            figures.mutations += 1
        figures.outside += {path.name for path in home.iterdir()} != {"originals"}
    return figures


if __name__ == "__main__":
    found = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for text in [*found.tracebacks, *found.accepted]:
        sys.stderr.write(f"{text}\n")
    sys.stdout.write(f"{found.line()}\n")
    sys.exit(found.bad())
