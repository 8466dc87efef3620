"""Every typo of one edit in every key and name of a recipe, and the share of them whose hint names the right word.

python tests/faults/typos.py
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from lillama import registry
from lillama.errors import LillamaError
from lillama.recipe.explain import NAMED, section_of
from lillama.recipe.schema import Recipe

DATA: dict[str, Any] = {
    "model": {"id": "some/model"},
    "compress": {"reduction": 0.3},
    "calibration": {"dataset": "text.txt"},
    "run": {"out": "runs/x"},
}
LETTERS = string.ascii_lowercase + "_"
_SAID = re.compile(r"Did you mean (.*)\?")


def typos(word: str, known: frozenset[str]) -> set[str]:
    """All words one edit away from `word` that are not known ones: letters added, left out, replaced, swapped."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    found = {a + letter + b for a, b in cuts for letter in LETTERS}
    found |= {a + b[1:] for a, b in cuts if b}
    found |= {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    found |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return {typo for typo in found if typo and typo not in known}


@dataclass
class Place:
    """A word of a recipe: where it is, the words that can be there, and a recipe with a typo in its place."""

    path: str
    word: str
    known: frozenset[str]
    with_typo: Callable[[str], dict[str, Any]] = field(repr=False)
    numeric: bool = False  # whether it takes a number

    def named(self, typo: str) -> list[str]:
        """The words that the hint names, the likeliest first; none where it lists all."""
        try:
            Recipe.parse(self.with_typo(typo))
        except LillamaError as error:
            said = [line for line in _own(str(error), typo) if _SAID.search(line)]
            return re.findall(r"'([^']*)'", said[0]) if said else []
        raise AssertionError(f"{self.path}: '{typo}' is accepted")


def _own(message: str, typo: str) -> list[str]:
    """The hint of the complaint that is about the typo: a required key that has one is missing as well."""
    lines = message.splitlines()
    at = [i for i, line in enumerate(lines) if f"'{typo}'" in line]
    assert at, message
    return lines[at[0] + 1 : at[0] + 2]


def _changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    return DATA | {key: DATA.get(key, {}) | value for key, value in changes.items()}


def _keys(schema: type[Any], path: tuple[str, ...]) -> Iterator[Place]:
    """The keys of a section of the recipe and of those below it."""
    known = frozenset(schema.model_fields)
    for name, option in schema.model_fields.items():
        yield Place(".".join((*path, name)), name, known, lambda typo: _nested(path, typo), _numeric(option))
        if section := section_of(option):
            yield from _keys(section, (*path, name + "[]" * ("list[" in repr(option.annotation))))


def _numeric(option: Any) -> bool:
    kinds = re.findall(r"\w+", repr(option.annotation))
    return bool({"int", "float"} & set(kinds))


def _nested(path: tuple[str, ...], typo: str) -> dict[str, Any]:
    if not path:
        return DATA | {typo: 1}
    value: Any = {typo: 1}
    for part in reversed(path[1:]):
        value = {part.removesuffix("[]"): [value] if part.endswith("[]") else value}
    return _changed({path[0]: value})


def places() -> Iterator[Place]:
    """Every key of every section, every name of a registry, every evaluator and its options."""
    yield from _keys(Recipe, ())
    for section, key, names in NAMED:
        for name in names:
            with_typo = lambda typo, section=section, key=key: _changed({section: {key: typo}})  # noqa: E731
            yield Place(f"{section}.{key}={name}", name, frozenset(names), with_typo)
    evaluators = frozenset(registry.EVALUATORS)
    for name in sorted(evaluators):
        yield Place(f"evaluate.{name}", name, evaluators, lambda typo: DATA | {"evaluate": {typo: {}}})
        options = registry.EVALUATORS.options(name).model_fields
        for option, held in options.items():
            with_typo = lambda typo, name=name: DATA | {"evaluate": {name: {typo: 1}}}  # noqa: E731
            yield Place(f"evaluate.{name}.{option}", option, frozenset(options), with_typo, _numeric(held))


@dataclass
class Count:
    """How many typos of each place there are, and of how many the hint names the right word first."""

    all: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def add(self, place: Place, typo: str) -> None:
        """Count what is said of one typo."""
        named = place.named(typo)
        right = named[:1] == [place.word]
        self.all[place.path] = self.all.get(place.path, 0) + 1
        self.first[place.path] = self.first.get(place.path, 0) + right
        if not right:
            self.missed.append(f"{place.path}: {typo} -> {named}")

    @property
    def share(self) -> float:
        """Of all typos, the share whose hint names the right word first."""
        return sum(self.first.values()) / sum(self.all.values())

    @property
    def share_of_words(self) -> float:
        """The same where every word counts alike: long words have many typos, short ones the hard ones."""
        return sum(self.first[path] / self.all[path] for path in self.all) / len(self.all)


def measure(every: int = 1) -> Count:
    """Look at all typos of all places, or at every so manieth of them."""
    count, number = Count(), 0
    for place in places():
        for typo in sorted(typos(place.word, place.known)):
            if number % every == 0:
                count.add(place, typo)
            number += 1
    return count


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    sys.stdout.write(
        f"{sum(found.all.values())} typos of one edit in {len(found.all)} words: "
        f"{found.share:.2%} named first, {found.share_of_words:.2%} of the average word's\n"
    )
    sys.stdout.write("".join(f"  {line}\n" for line in found.missed[:40]))
