"""Recipes and sweeps with things gone wrong in them, and whether `lillama validate` says so without a traceback.

    python tests/faults/mutate_recipes.py 10000 [SEED]

Each is made from one of recipes/ and goes through the verb itself, in this process. Counted are tracebacks, files that
are written or removed, processes and connections, and imports of modules that the recipe names.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "plugins")]

import typos
import yaml

from lillama.cli import main
from lillama.errors import LillamaError

ROOT = Path(__file__).parents[2]
MODULES = ("os", "antigravity", "this", "turtledemo.clock", "lib2to3.main", "idlelib.run", "wsgiref.simple_server")
VALUES = (
    *("null", "~", "''", "true", "no", "[]", "{}", "[[]]", "{a: b}", "{'': {'': ''}}", "- a", "? a", "|", ">-", "*a"),
    *("-1", "0", "1", "2", "1e309", "-1e-400", ".nan", ".inf", "-.inf", "9" * 30, "9" * 9000, "1e18", "0x10", "1_0"),
    *("2024-01-01", "12:30:00", "!!int x", "!!float ''", "!!bool x", "!!binary aGk=", "!!set {a, b}", "!x y", "!<x> y"),
    *(
        "/etc/passwd",
        "/",
        ".",
        "..",
        "../../../x",
        "~root",
        "/dev/zero",
        "file:///etc/passwd",
        "http://[::1",
        "a" * 300,
    ),
    *(f"package:{name}" for name in MODULES),
    *(f"{name}:main" for name in MODULES),
    *("!!python/object/apply:os.system [touch x]", "!!python/name:antigravity", "!!python/module:antigravity"),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\u202e"',
        '"\\x1b[2J"',
        "\u202e",
        "\ufeff",
        "\U0001f4a5" * 99,
        "a" * 9000,
        "%s%n{0}",
        "'",
    ),
    *("&a [*a]", "&a {<<: *a}", "[" * 200, "{a: " * 200, "[" * 40 + "]" * 40, "x\t: y", "*", "**/[", "perplexity"),
)
_LINE = re.compile(rb"^(\s*(?:- )?)([\w./'\"*]+)(:\s*)(.*)$")
Mutation = Callable[[random.Random, list[bytes]], None]


def _place(rng: random.Random, lines: list[bytes]) -> tuple[int, re.Match[bytes]] | None:
    """A line that gives a key a value."""
    found = [(i, match) for i, line in enumerate(lines) if (match := _LINE.match(line))]
    return rng.choice(found) if found else None


def flip(rng: random.Random, lines: list[bytes]) -> None:
    """Bits of a few bytes."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        line = bytearray(lines[at] or b" ")
        line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        lines[at] = bytes(line)


def drop(rng: random.Random, lines: list[bytes]) -> None:
    """A line, or all that follow it."""
    at = rng.randrange(len(lines))
    del lines[at : at + 1 if rng.random() < 0.8 else None]
    lines.extend([b""] * (not lines))


def double(rng: random.Random, lines: list[bytes]) -> None:
    """A line twice, somewhere else as a rule."""
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def swap(rng: random.Random, lines: list[bytes]) -> None:
    """Two lines in each other's place."""
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def shift(rng: random.Random, lines: list[bytes]) -> None:
    """A line further left or right."""
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((b" ", b"  ", b"\t", b"- ", b"? ")) + lines[at] if rng.random() < 0.7 else lines[at].lstrip()


def replace(rng: random.Random, lines: list[bytes]) -> None:
    """A value by one of another type, an extreme one, a path, a module, or text of any kind."""
    if (found := _place(rng, lines)) is not None:
        lines[found[0]] = b"".join(found[1].group(1, 2)) + b": " + rng.choice(VALUES).encode("utf-8", "surrogatepass")


def misspell(rng: random.Random, lines: list[bytes]) -> None:
    """A key by one edit, or another line's."""
    if (found := _place(rng, lines)) is None:
        return
    indent, key, colon, value = found[1].groups()
    at = rng.randrange(len(key))
    other = _place(rng, lines)
    letter = bytes([rng.choice(b"abcdefghijklmnopqrstuvwxyz_.*/")])
    keys = [key[:at] + letter + key[at:], key[:at] + key[at + 1 :], key[:at] + letter + key[at + 1 :], other[1][2]]
    lines[found[0]] = indent + rng.choice(keys) + colon + value


def alias(rng: random.Random, lines: list[bytes]) -> None:
    """An anchor somewhere, and an alias or a merge of it elsewhere."""
    if (one := _place(rng, lines)) is None or (two := _place(rng, lines)) is None:
        return
    lines[one[0]] = b"".join(one[1].group(1, 2)) + b": &a " + one[1][4]
    new = b"<<: *a" if rng.random() < 0.4 else two[1][2] + b": *a"
    lines[two[0]] = two[1][1] + new
    if rng.random() < 0.3:
        lines.append(b"\n".join(b"b%d: &b%d [%s]" % (i, i, b", ".join([b"*b%d" % (i - 1)] * 9)) for i in range(1, 9)))


def nest(rng: random.Random, lines: list[bytes]) -> None:
    """A value within lists or mappings."""
    if (found := _place(rng, lines)) is not None:
        depth = rng.choice((1, 2, 5, 29, 100))
        start, end = rng.choice(((b"[", b"]"), (b"{a: ", b"}"), (b"{model: ", b"}")))
        lines[found[0]] = b"".join(found[1].group(1, 2)) + b": " + start * depth + found[1][4] + end * depth


def options(rng: random.Random, lines: list[bytes]) -> None:
    """Another evaluator, with an option or two."""
    name = rng.choice(
        ("perplexity", "harness", "wer", "speed", "sample", "stable_rank", "perplexity/x", "x/y", "/", "")
    )
    keys = ("dataset", "files", "tasks", "include", "limit", "split", "lengths", "tokens", "prompt", "", "0")
    given = ", ".join(f"{rng.choice(keys)}: {rng.choice(VALUES)}" for _ in range(rng.randint(0, 2)))
    at = next((i + 1 for i, line in enumerate(lines) if line.startswith(b"evaluate:")), len(lines))
    lines.insert(at, f"  {name}: {{{given}}}".encode("utf-8", "surrogatepass"))


MUTATIONS: tuple[Mutation, ...] = (flip, drop, double, swap, shift, replace, replace, misspell, alias, nest, options)


@dataclass
class Figures:
    """What came of the recipes."""

    count: int = 0
    valid: int = 0
    tracebacks: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.count} recipes, {self.valid} of them valid: {len(self.tracebacks)} tracebacks, "
            f"{len(self.touched)} files touched, {len(self.imports)} imports of what they name, "
            f"{1000 * self.seconds / self.count:.1f} ms each, {1000 * self.slowest:.0f} ms the slowest"
        )


class Watch:
    """What the interpreter does while `on`: an audit hook, which stays for good, and the first finder of modules."""

    def __init__(self) -> None:
        self.on = False
        self.touched: list[str] = []
        self.imports: list[str] = []
        sys.addaudithook(self._hook)
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """Called for every module that is not loaded yet, by whatever way it is imported; finds none."""
        if self.on:
            self.imports.append(name)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.touched.append(f"open {args[0]}")
        elif event in WATCHED:
            self.touched.append(f"{event} {args[:1]}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.touched, self.imports, self.on = [], [], True
        try:
            yield
        finally:
            self.on = False


WATCHED = (
    *("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.truncate", "os.chmod", "os.system"),
    *("os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
)


TYPED: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e300, -1e300, 2**63, -(2**63), 10**30, 10**3990, math.nan, math.inf),
    *(
        "",
        " ",
        "a" * 300,
        "a" * 9000,
        "\u202e",
        "\ufeff",
        "\x1b[2J",
        "\U0001f4a5" * 99,
        "1e-3",
        "no",
        "x=y",
        "a.b",
        "*",
    ),
    *("/", ".", "..", "../x", "~nobody/x", "/dev/zero", "/etc/passwd", "train[:", "train[80%:]+test", "[", "**/[!"),
    *([], [[]], [None], [1, "a", {}], ["a"] * 500, {}, {"": None}, {"a": {"b": [1]}}, {1: 2}, {None: None}, [math.nan]),
    *(f"package:{name}" for name in MODULES),
    *(f"{name}:main" for name in MODULES),
    *("bottom", "fisher", "svd", "pivoted", "mse", "student", "concurrent", "perplexity", "speed", "auto", "decoder"),
)


def _holders(data: Any, found: list[Any]) -> list[Any]:
    """All mappings and lists in `data` that hold something."""
    if isinstance(data, dict | list) and data:
        found.append(data)
        for value in data.values() if isinstance(data, dict) else data:
            _holders(value, found)
    return found


def mutated_data(rng: random.Random, data: Any) -> bytes:
    """Sound YAML with one to three values or keys that are wrong: replaced, moved, shared, nested, renamed, gone."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = _holders(data, [])
        if not holders:
            break
        holder, other = rng.choice(holders), rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = rng.randrange(8)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(TYPED))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice(("", "x", 1, None, "*", f"{key}s", str(key)[1:], str(key).upper()))] = holder.pop(key)
        elif kind == 5 and isinstance(other, dict) and other is not holder[key]:
            other[rng.choice((key, *FIELDS))] = copy.deepcopy(holder[key])
        elif kind == 6:
            holder[key] = rng.choice(([holder[key]], {key: holder[key]}, {"a": [holder[key], holder[key]]}))
        elif isinstance(other, dict):
            other[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(TYPED))
    return yaml.safe_dump(data, sort_keys=rng.random() < 0.5, allow_unicode=True).encode("utf-8", "surrogatepass")


FIELDS = tuple(dict.fromkeys(place.word for place in typos.places() if "=" not in place.path))


def mutated(rng: random.Random, text: bytes, data: Any) -> bytes:
    """The text with one to four things wrong in it: in its lines, or in what it means."""
    if rng.random() < 0.6:
        return mutated_data(rng, data)
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(MUTATIONS)(rng, lines)
    return b"\n".join(lines)


def override(rng: random.Random, text: bytes) -> list[str]:
    """A `--set` of a key that may be, as a rule none."""
    keys = [match[2].decode("utf-8", "surrogateescape") for line in text.split(b"\n") if (match := _LINE.match(line))]
    if not keys or rng.random() < 0.85:
        return []
    sections = ("model", "compress", "distill", "calibration", "finetune", "evaluate", "run", "x", "")
    parts = [rng.choice(sections), *(rng.choice(keys) for _ in range(rng.randint(1, 2)))]
    return [f"{'.'.join(parts)}={rng.choice(VALUES)}"]


def validate(path: Path, overrides: list[str]) -> None:
    """What `lillama validate` does, its output thrown away."""
    with contextlib.redirect_stdout(io.StringIO()):
        main.validate(argparse.Namespace(recipe=str(path), set=overrides))


def try_recipes(count: int, seed: int = 0, keep: Path | None = None) -> Figures:
    """Validate so many; those with tracebacks are left in `keep`."""
    figures, watch = Figures(), Watch()
    with tempfile.TemporaryDirectory() as folder:
        recipes = Path(folder) / "recipes"
        shutil.copytree(ROOT / "recipes", recipes)
        originals = sorted(recipes.rglob("*.yaml"))
        for path in originals:
            validate(path, [])
        texts = {path: path.read_bytes() for path in originals}
        data = {path: yaml.safe_load(text) for path, text in texts.items()}
        for number in range(count):
            rng = random.Random(f"{seed}/{number}")
            original = rng.choice(originals)
            path = original.with_name("mutated.yaml")
            text = mutated(rng, texts[original], data[original])
            path.write_bytes(text)
            overrides = override(rng, text)
            _try(path, overrides, text, figures, watch)
            if keep and figures.tracebacks and figures.tracebacks[-1].startswith(f"{number}: "):
                shutil.copy(path, keep / f"{number}.yaml")
    sys.meta_path.remove(watch)
    return figures


def _try(path: Path, overrides: list[str], text: bytes, figures: Figures, watch: Watch) -> None:
    number, began = figures.count, time.perf_counter()
    figures.count += 1
    with watch.watching():
        try:
            validate(path, overrides)
            figures.valid += 1
        except LillamaError as error:
            str(error).encode("utf-8", "backslashreplace")
        except Exception:
            figures.tracebacks.append(f"{number}: {overrides} {traceback.format_exc()}")
    seconds = time.perf_counter() - began
    figures.seconds += seconds
    figures.slowest = max(figures.slowest, seconds)
    named = text + "".join(overrides).encode("utf-8", "surrogatepass")
    figures.touched += [f"{number}: {one}" for one in watch.touched]
    figures.imports += [f"{number}: {one}" for one in watch.imports if re.search(rb"\b" + one.encode() + rb"\b", named)]


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    found = try_recipes(*(arguments or [1000]))
    sys.stdout.write(f"{found}\n")
    for line in [*found.tracebacks[:5], *found.touched[:5], *found.imports[:5]]:
        sys.stdout.write(f"{line}\n")
    sys.exit(bool(found.tracebacks or found.touched or found.imports))
