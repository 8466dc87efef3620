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


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the words and decimal numbers of YAML 1.2's core schema, and no other types."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }


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
    return int(node.value.replace("_", ""))


_Loader.add_constructor(_TAG + "int", _construct_int)


class Document:
    """A parsed YAML text: its `data`, and `where(path)` for messages that point into the file."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self._lines: dict[Path_, int] = {}
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is not None:
                self._index(node, ())
            self.data: Any = None if node is None else loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            raise LillamaError(
                f"not valid YAML: {problem}",
                where=f"{name}{line}",
                hint="Check the indentation, and put text that begins with a special character in quotes.",
            ) from error
        except yaml.YAMLError as error:
            raise LillamaError(f"not valid YAML: {error}", where=name) from error
        except (KeyError, ValueError) as error:  # a tag that its value does not fit: !!int x, !!bool x
            raise LillamaError(f"a value cannot be read: {error}", where=name) from error
        except RecursionError as error:
            raise LillamaError("nested too deeply, or an alias contains itself", where=name) from error

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
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LillamaError(
            f"cannot read the file: {error.strerror}", where=str(path), hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise LillamaError(
            f"the file is not UTF-8 text (byte {error.start})", where=str(path), hint="Save it as UTF-8."
        ) from error
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
