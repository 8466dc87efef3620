"""What is said of a recipe that does not fit: where the value came from, and what was probably meant."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lillama import registry
from lillama.errors import LillamaError, did_you_mean, distance, nearest, quoted
from lillama.recipe import yamlfile
from lillama.recipe.section import REFUSED
from lillama.registry import Registry

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Path_ = tuple[str | int, ...]


class Origin:
    """Where the values of a recipe came from: lines of a file, and `--set`s."""

    def __init__(self, document: yamlfile.Document) -> None:
        self.document = document
        self.overrides: dict[Path_, str] = {}

    def where(self, path: Path_) -> str:
        """The `--set` that gave or made the key `path`, or file:line and the key."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return self.overrides[path[:end]]
        for key, override in self.overrides.items():
            if key[: len(path)] == path and not self.document.holds(path):
                return override
        return f"{self.document.where(path)}: {'.'.join(map(str, path))}"


def together(errors: Iterable[LillamaError]) -> LillamaError:
    every = list(errors)
    return every[0] if len(every) == 1 else LillamaError("\n".join(map(str, every)))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section a field holds, or has a list of, if it does."""
    kinds = [field.annotation]
    for kind in kinds:  # those inside of others are added on the way
        if isinstance(kind, type) and not get_args(kind) and issubclass(kind, BaseModel):
            return kind
        kinds += get_args(kind)
    return None


def _nearest_key(path: Path_, top: type[BaseModel], schema: type[BaseModel]) -> str:
    """A hint for the unknown key `path`: one of its section an edit away, the same of another, or the nearest."""
    key, others = str(path[-1]), []
    if schema is top:
        sections = {name: section_of(field) for name, field in top.model_fields.items()}
        others = [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]
        for part in path[:-1]:
            field = schema.model_fields.get(str(part))
            schema = (field and section_of(field)) or schema
    near = [name for name in nearest(key, schema.model_fields) if not others or distance(key, name) <= 1]
    if near or others:
        return f"Did you mean {quoted(near + others)}?"
    return did_you_mean(key, schema.model_fields)


_HINTS = {
    "string_type": "Put it in quotes.",
    "bool_type": "Write true or false.",
    "list_type": "Write a list: [a, b].",
}
_MAPPING_TYPES = ("model_type", "dict_type", "model_attributes_type")


SHOULD_BE = "Input should be "  # how most of pydantic's complaints begin
NOT_OF_THE_TYPE = ("_type", "_parsing", "literal_error")
MOST = 20  # complaints that are told of one recipe: a hint takes longer than most people read


def explained(
    error: ValidationError, prefix: Path_, origin: Origin, top: type[BaseModel], schema: type[BaseModel]
) -> list[LillamaError]:
    """The complaints of pydantic's about what stands at `prefix`, the first of them where they are many."""
    problems = list(_less_alternatives(error.errors(), schema))
    told = [explain(problem, prefix, origin, top, schema) for problem in problems[:MOST]]
    rest = len(problems) - len(told)
    return [*told, LillamaError(f"and {rest} more")] if rest else told


def _less_alternatives(problems: Iterable[ErrorDetails], schema: type[BaseModel]) -> Iterator[ErrorDetails]:
    """One complaint where a value may be given in several ways, of each of which pydantic has its own.

    That of the way whose type fits; where there is none, those of all are joined: "a valid number or a valid list".
    """
    for _, group in itertools.groupby(problems, key=lambda problem: _place(problem["loc"], schema)[1]):
        alike = [problem.copy() for problem in group]
        for problem in alike:
            problem["loc"] = _place(problem["loc"], schema)[0]
        deepest = max(len(problem["loc"]) for problem in alike)
        best = [problem for problem in alike if len(problem["loc"]) == deepest]
        best = [problem for problem in best if not problem["type"].endswith(NOT_OF_THE_TYPE)] or best
        if len(best) > 1 and all(problem["loc"] == best[0]["loc"] for problem in best):
            said = dict.fromkeys(problem["msg"].removeprefix(SHOULD_BE) for problem in best)
            best = best[:1]
            best[0]["msg"], best[0]["type"] = SHOULD_BE + " or ".join(said), "alternatives"
        yield from best


def _place(loc: Path_, schema: Any) -> tuple[Path_, Path_]:
    """(where a complaint is, without pydantic's names for alternatives; where those were to choose from, if any)."""
    path: Path_ = ()
    chosen: Path_ | None = None
    ways = _ways(schema)
    for key in loc:
        if len(ways) > 1:  # then the key is the name of one of them, and what is below it is a list's
            chosen = path if chosen is None else chosen
            ways = [way for way in ways if get_origin(way) is list][:1]
            continue
        path = (*path, key)
        kind = ways[0] if ways else None
        if isinstance(kind, type) and not get_args(kind) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(key))
            ways = _ways(field.annotation) if field else []
        else:
            ways = _ways((get_args(kind) or (None,))[-1])  # what a list or a mapping holds
    return path, loc if chosen is None else chosen


def _ways(kind: Any) -> list[Any]:
    """The types that a value of `kind` may have, null aside."""
    if get_origin(kind) is Annotated:
        return _ways(get_args(kind)[0])
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return [way for given in get_args(kind) if given is not type(None) for way in _ways(given)]


def explain(
    problem: ErrorDetails, prefix: Path_, origin: Origin, top: type[BaseModel], schema: type[BaseModel]
) -> LillamaError:
    """A complaint of pydantic's about what stands at `prefix`, of type `schema`, in a recipe (`top`)."""
    path = (*prefix, *problem["loc"])
    where, kind, hint = origin.where(path), problem["type"], None
    if kind == "extra_forbidden":
        what, hint = f"unknown key '{path[-1]}'", _nearest_key(path, top, schema)
    elif kind == "missing":
        what, hint = f"the key '{'.'.join(map(str, path))}' is missing", "Add it."
        where = origin.document.where(path)
    elif kind == REFUSED:
        what, hint = problem["msg"], problem["ctx"]["hint"]
    else:
        message = f"{problem['msg'][0].lower()}{problem['msg'][1:]}".replace("None", "null")
        if kind in _MAPPING_TYPES:
            message = "input should be a mapping of keys to values"
        given = json.dumps(problem["input"], default=str, ensure_ascii=False)
        what = f"{message}, not {given if len(given) < 80 else given[:76] + ' ...'}"
        hint = _HINTS.get(kind) if isinstance(problem["input"], str | int | float) else None
    return LillamaError(what, where=where, hint=hint)


# The keys of a recipe whose values are names of a registry.
NAMED: tuple[tuple[str, str, Registry], ...] = (
    ("compress", "strategy", registry.STRATEGIES),
    ("compress", "init", registry.INITIALISERS),
    ("compress", "storage", registry.STORAGES),
    ("distill", "loss", registry.LOSSES),
    ("distill", "objective", registry.OBJECTIVES),
    ("distill", "schedule", registry.SCHEDULES),
)


def named(schema: type[BaseModel]) -> Iterator[tuple[str, str, Registry]]:
    """(section, key, registry) of the names that a recipe of type `schema` holds."""
    for section, key, names in NAMED:
        if section in schema.model_fields:
            yield section, key, names


def check_names(recipe: BaseModel, origin: Origin) -> dict[str, dict[str, Any]]:
    """Check names that stand for plugins and functions; return the options of evaluators, typed."""
    errors, options = [], {}
    values: Any = recipe
    checks: list[tuple[Path_, str, Callable[..., None]]] = [(("plugin",), values.plugin, registry.PLUGINS.check)]
    for section, key, names in named(type(recipe)):
        checks.append(((section, key), getattr(getattr(values, section), key), names.check))
    for path, value, check in checks:
        try:
            check(value, origin.where(path))
        except LillamaError as error:
            errors.append(error)
    for key, given in values.evaluate.items():
        name = key.partition("/")[0]
        try:
            registry.EVALUATORS.check(name, origin.where(("evaluate", key)))
            schema = registry.EVALUATORS.options(name)
            options[key] = schema.model_validate(given).model_dump(exclude_unset=True)
        except ValidationError as error:
            errors += explained(error, ("evaluate", key), origin, type(recipe), schema)
        except LillamaError as error:
            errors.append(error)
    if errors:
        raise together(errors)
    return options
