"""What goes wrong in recipes: in their lines, and in what they mean. Everything is drawn from a given generator."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable
from typing import Any

import typos
import yaml

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
