"""docs/recipe.md, written from the recipe's own types and descriptions: `lillama schema --markdown`."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lillama import registry
from lillama.recipe.explain import named, section_of
from lillama.recipe.schema import Recipe

HEAD = """# The recipe

Written by `lillama schema --markdown > docs/recipe.md`; a test keeps it so.

A recipe is a YAML file that fixes a run. Unknown keys, keys given twice and values of a wrong type are refused with
file, line and the nearest valid key. `--set dotted.key=VALUE` overrides anything, its value read as YAML.
For editors: `lillama schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` on top of
a recipe.
"""


def markdown() -> str:
    """The reference page of the recipe and of the evaluators' options."""
    parts = [HEAD]
    top = [(n, f) for n, f in Recipe.model_fields.items() if section_of(f) is None]
    parts.append(_table(top))
    parts += _sections(Recipe, "", "##")
    parts.append("## Evaluators\n\n`evaluate:` maps an evaluator's name (or NAME/LABEL) to its options.\n")
    for name in registry.EVALUATORS:
        doc = (registry.EVALUATORS.get(name).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        parts.append(f"### {name}\n\n{' '.join(doc.split())}\n")
        parts.append(_table(registry.EVALUATORS.options(name).model_fields.items()))
    return "\n".join(parts)


def _sections(owner: type[BaseModel], path: str, heading: str) -> list[str]:
    """The chapters of the sections in `owner`, those inside them after each."""
    parts = []
    for name, field in owner.model_fields.items():
        section = section_of(field)
        if section is not None:
            text = field.description or section.__doc__ or ""
            parts.append(f"{heading} {path}{name}\n\n{text.strip()}\n")
            parts.append(_table(section.model_fields.items()))
            parts += _sections(section, f"{path}{name}.", f"{heading}#")
    return parts


def _table(fields: Any) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in fields:
        cells = (f"`{name}`", _type(field.annotation), _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if arguments and all(isinstance(a, str | int) for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    origin = getattr(annotation, "__origin__", None)
    if origin in (list, dict):
        return "list" if origin is list else "mapping"
    if get_origin(annotation) is Annotated:
        return _type(arguments[0])  # what else is said of it are bounds
    if arguments:
        return " or ".join(_type(a) for a in arguments)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def schema() -> dict[str, Any]:
    """The JSON schema of recipes with the names that are installed here, for editors and for docs/recipe.md."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    evaluate = schema["properties"]["evaluate"]
    evaluate["properties"], evaluate["patternProperties"] = {}, {}
    for name in registry.EVALUATORS:
        options = registry.EVALUATORS.options(name).model_json_schema()
        schema["$defs"] |= options.pop("$defs", {})
        evaluate["properties"][name] = {"anyOf": [options, {"type": "null"}]}
        evaluate["patternProperties"][f"^{re.escape(name)}/"] = evaluate["properties"][name]
    evaluate["additionalProperties"] = False
    for section, key, known in named(Recipe):
        schema["$defs"][section.capitalize()]["properties"][key]["enum"] = list(known)
    return schema
