"""Recipes and sweeps with things gone wrong in them, and whether `lillama validate` says so without a traceback.

    python tests/faults/mutate_recipes.py 10000 [SEED]

Each is made from one of recipes/ and goes through the verb itself, in this process. Counted are tracebacks, files that
are written or removed, processes and connections, and imports of modules that the recipe names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "plugins")]

import yaml
from recipe_mutations import mutated, override

from lillama.cli import main
from lillama.errors import LillamaError

ROOT = Path(__file__).parents[2]


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
