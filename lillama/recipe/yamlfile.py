"""YAML as people expect it: `1e-4` is a number, `no` is a word, a key given twice is an error.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is False and the last of two equal keys wins.
Not ruamel.yaml: its dates, sets, tags and wrapped values take as many lines to undo, and it is 2 to 4 times slower.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lillama.errors import LillamaError

Path_ = tuple[str | int, ...]

# Far more than a recipe or a sweep has, and read in a moment.
MOST_CHARACTERS = 100_000
MOST_VALUES = 2_000  # keys count as well, and an alias with all that it stands for
MOST_LEVELS = 30
MOST_DIGITS = 4000  # of a whole number: Python refuses more than 4300
_HINT = "Check the indentation, and put text that begins with a special character in quotes."
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the words and decimal numbers of YAML 1.2's core schema, and no other types."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._deepest = 0  # level below the node that is being composed
        self._values = 0
        self._anchored: dict[int, tuple[int, int]] = {}  # values and levels of nodes, by id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; a document that is too large, or would be with its aliases written out, is an error."""
        event = self.peek_event()
        mark: Any = event.start_mark
        before, outer, self._deepest = self._values, self._deepest, self._level + 1
        self._level += 1
        self._values += 1
        self._bounded(mark)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._anchored:
                raise _TooMuch(None, None, f"the alias '*{event.anchor}' contains itself", mark)
            values, levels = self._anchored[id(node)]
            self._values += values - 1
            self._deepest += levels
            self._bounded(mark)
        elif event.anchor is not None:
            self._anchored[id(node)] = (self._values - before, self._deepest - self._level)
        self._level -= 1
        self._deepest = max(outer, self._deepest)
        return node

    def _bounded(self, mark: Any) -> None:
        if self._values > MOST_VALUES:
            raise _TooMuch(None, None, f"more than {MOST_VALUES} values, those that aliases repeat included", mark)
        if self._deepest > MOST_LEVELS:
            raise _TooMuch(None, None, f"nested too deeply: more than {MOST_LEVELS} levels", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; one that its tag does not fit (!!int x) is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (LookupError, ValueError) as error:
            raise _Unreadable(None, None, str(error), node.start_mark) from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """The text of a node, without characters that no file name and no terminal takes."""
        text: str = super().construct_scalar(node)
        if wrong := _UNPRINTABLE.search(text):
            raise _Unreadable(None, None, f"the character U+{ord(wrong[0]):04X} is not allowed", node.start_mark)
        return text


_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")


class _TooMuch(yaml.MarkedYAMLError):
    """A document that would take too long or too much memory."""


class _Unreadable(yaml.MarkedYAMLError):
    """A value that is not of its type."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes any text which YAML 1.1 or `_Loader` would read as something else."""


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9](?:_?[0-9])*", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds the line ends of Unicode into others unless the text is in double quotes.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.2 has no octal by leading zero: 010 is ten.
    digits = node.value.replace("_", "")
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


_Loader.add_constructor(_TAG + "int", _construct_int)


class Document:
    """A parsed YAML text: its `data`, and `where(path)` for messages that point into the file."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self._lines: dict[Path_, int] = {}
        if len(text) > MOST_CHARACTERS:
            raise LillamaError(
                f"more than {MOST_CHARACTERS} characters",
                where=self._line(text.count("\n", 0, MOST_CHARACTERS)),
                hint="Recipes and sweeps are short: is this one?",
            )
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is not None:
                self._index(node, ())
            self.data: Any = None if node is None else loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            raise self._explained(error) from error
        except yaml.reader.ReaderError as error:
            line = self._line(text.count("\n", 0, error.position))
            what = f"not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed"
            raise LillamaError(what, where=line, hint="Remove it.") from error
        except ValueError as error:  # from within the parser: "\U00ffffff", %YAML with a number of 5000 digits
            raise LillamaError(f"not valid YAML: {error}", where=name, hint=_HINT) from error

    def _line(self, line: int) -> str:
        return f"{self.name}:{line + 1}"

    def _explained(self, error: yaml.MarkedYAMLError) -> LillamaError:
        mark = error.problem_mark or error.context_mark
        where = self._line(mark.line) if mark else self.name
        if isinstance(error, _TooMuch):
            return LillamaError(str(error.problem), where=where, hint="Recipes and sweeps are short: is this one?")
        if isinstance(error, _Unreadable):
            return LillamaError(f"a value cannot be read: {error.problem}", where=where)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        return LillamaError(f"not valid YAML: {problem}", where=where, hint=_HINT)

    def holds(self, path: Path_) -> bool:
        """Whether the file gives the key `path`."""
        return path in self._lines

    def where(self, path: Path_) -> str:
        """`file:line` of the deepest part of `path` that the file holds."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._lines:
                return f"{self.name}:{self._lines[path[:end]]}"
        return self.name

    def _index(self, node: yaml.Node, path: Path_) -> None:
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self._lines[(*path, i)] = child.start_mark.line + 1
                self._index(child, (*path, i))
        elif isinstance(node, yaml.MappingNode):
            self._index_mapping(node, path)

    def _index_mapping(self, node: yaml.MappingNode, path: Path_) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            where = f"{self.name}:{line}"
            if not isinstance(key, yaml.ScalarNode):
                raise LillamaError("a key must be a word, not a list or a mapping", where=where)
            if key.value in seen:
                raise LillamaError(
                    f"the key '{key.value}' is given twice (first on line {seen[key.value]})",
                    where=where,
                    hint="Keep one of them.",
                )
            seen[key.value] = line
        # What `<<` merges in comes first, so that the mapping's own keys own their lines.
        for key, child in node.value:
            if key.tag == _TAG + "merge":
                for base in reversed(child.value) if isinstance(child, yaml.SequenceNode) else [child]:
                    self._index(base, path)
        for key, child in node.value:
            if key.tag != _TAG + "merge":
                self._lines[(*path, key.value)] = seen[key.value]
                self._index(child, (*path, key.value))


def load(path: str | Path) -> Document:
    """Read a YAML file; a missing or unreadable one is an error that says so."""
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(4 * MOST_CHARACTERS + 1)  # of 4 bytes at most
        text = data.decode("utf-8")
    except OSError as error:
        raise LillamaError(
            f"cannot read the file: {error.strerror}", where=str(path), hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise LillamaError(
            f"the file is not UTF-8 text (byte {error.start})", where=str(path), hint="Save it as UTF-8."
        ) from error
    except ValueError as error:  # a path with a NUL
        raise LillamaError(f"cannot read the file: {error}", where=repr(str(path)), hint="Check the path.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Document(text, str(path))


def value(text: str, name: str) -> Any:
    """One value as YAML reads it, for `--set key=value`."""
    try:
        return Document(text, "").data
    except LillamaError as error:
        error.where = name  # it has no lines to speak of
        raise


def dump(data: Any) -> str:
    """YAML text that `Document` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
