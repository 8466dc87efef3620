"""Writes the plugin file that lists what tracing found: as short as a person would have written it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from lillama.cli.trace import Signature, grouped, runs, same_layers
from lillama.contract import Layer, relative
from lillama.errors import LillamaError

WIDTH = 118
CAUSAL = "AutoModelForCausalLM"


_ENUMERATE = """@hookimpl
def enumerate_layers(model):
    if model.config.model_type != "{kind}":
        return None
{answer}"""
_AUTO = """@hookimpl
def auto_class(config):
    import transformers
    return transformers.{auto} if config.model_type == "{kind}" else None"""


def plugin_file(model: Any, layers: Sequence[Layer], auto_class: str = CAUSAL) -> str:
    """The text of a plugin whose enumerate_layers gives `layers` for `model`, which was made sure of.

    `auto_class` is the class of transformers that opens the model. Raises LillamaError where none can be written.
    """
    text = Writer(model, auto_class).write(layers)
    scope: dict[str, Any] = {}
    exec(compile(text, "plugin", "exec"), scope)
    if not same_layers(scope["enumerate_layers"](model), layers):
        raise LillamaError(
            f"the layers of {type(model).__name__} follow no rule that a short plugin can state",
            hint="Write its enumerate_layers by hand (docs/plugins.md), or use the recipe's plugin: auto.",
        )
    return text


def signature(layer: Layer) -> Signature:
    """The linears of a block by common input, by their names inside the block."""
    groups = ([relative(w, layer) for w in group if w.kind == "linear"] for group in grouped(layer))
    return tuple(tuple(group) for group in groups if group)


def experts(layer: Layer) -> list[str]:
    """The names, inside a block, of the modules that hold its stacked experts."""
    holders = (relative(w, layer).rpartition(".")[0] for w in layer.weights if w.kind == "experts")
    return list(dict.fromkeys(holders))


def merged(signatures: Sequence[Signature]) -> Signature:
    """One table for blocks that differ: groups with a name in common become one, in an order that fits all."""
    table: list[list[str]] = []
    for one in signatures:
        at = 0
        for group in one:
            found = next((i for i, known in enumerate(table) if set(known) & set(group)), None)
            if found is None:
                table.insert(at, list(group))
                at += 1
            else:
                table[found] += [name for name in group if name not in table[found]]
                at = max(at, found + 1)
    return tuple(tuple(group) for group in table)


class Writer:
    """Gathers the tables and helpers of a plugin file for `model` while its layers are written."""

    def __init__(self, model: Any, auto_class: str = CAUSAL) -> None:
        self.model, self.auto_class = model, auto_class
        self.tables: list[str] = []
        self.helpers: list[str] = []
        self.mlps: list[tuple[str, ...]] = []  # the linears of MLPs whose neurons may be removed
        self.names = {"Layer"}
        self.shared: Signature = ()  # a table that serves every list of blocks

    def write(self, layers: Sequence[Layer]) -> str:
        """The whole text."""
        blocks = [layer for name, run in runs(layers) if name for layer in run if layer.weights]
        whole = merged([signature(block) for block in blocks])
        self.shared = whole if self.gives(whole, blocks) else ()
        parts = [self.one(run[0]) if name is None else self.stack(name, run) for name, run in runs(layers)]
        kind = self.model.config.model_type
        hooks = [_ENUMERATE.format(kind=kind, answer=_answer(parts))]
        if self.auto_class != CAUSAL:
            hooks.append(_AUTO.format(kind=kind, auto=self.auto_class))
        imported = f"from lillama import {', '.join(sorted(self.names))}, hookimpl"
        head = f'"""{type(self.model).__name__} for lillama."""\n\n{imported}\n'
        known = (("NEURONS" if n == 0 else f"NEURONS_{n + 1}", linears) for n, linears in enumerate(self.mlps))
        mlps = [_filled(f"{own} = (", [_quoted(one) for one in linears], ")") for own, linears in known]
        tables = "".join(f"\n{table}\n" for table in [*self.tables, *mlps])
        return head + tables + "".join(f"\n\n{part}\n" for part in [*self.helpers, *hooks])

    def one(self, layer: Layer) -> str:
        """The expression for a layer that stands alone."""
        if not layer.weights:
            return f'Layer("{layer.name}"{_kind(layer)})'
        for made, text in (
            (Layer.of_embedding, "Layer.of_embedding(model)"),
            (Layer.of_head, "Layer.of_head(model)"),
        ):
            if layer.kind in text and same_layers([made(self.model)], [layer]):
                return text
        table = signature(layer)
        if not experts(layer) and self.gives(table, [layer]):
            return f'Layer.of_linears(model, "{layer.name}", {_tuple(map(_tuple, table))})'
        self.names.add("Weight")
        weights = _tuple(repr(weight).replace("'", '"') for weight in layer.weights)
        return f'Layer("{layer.name}", {weights}{_kind(layer)})'

    def gives(self, table: Signature, blocks: Sequence[Layer]) -> bool:
        """Whether `Layer.of_linears` with this table lists the linears of all `blocks` as they are."""
        bare = [
            Layer(block.name, tuple(w for w in block.weights if w.kind == "linear"), block.kind) for block in blocks
        ]
        return same_layers([Layer.of_linears(self.model, block.name, table) for block in blocks], bare)

    def stack(self, name: str, blocks: Sequence[Layer]) -> str:
        """The expression for the blocks in the list of modules `name`, a star before it."""
        numbers = [int(block.name.rpartition(".")[2]) for block in blocks]
        if numbers == list(range(len(self.model.get_submodule(name)))):
            over = f"range(len({_module(name)}))"
        else:
            over = repr(tuple(numbers))
        if not any(block.weights for block in blocks):
            return f'*(Layer(f"{name}.{{i}}") for i in {over})'
        table = self.table(blocks, numbers)
        if any(experts(block) for block in blocks):
            return f'*({self.helper(blocks)}(model, f"{name}.{{i}}", {table}) for i in {over})'
        return f'*(Layer.of_linears(model, f"{name}.{{i}}", {table}{self.neurons(blocks)}) for i in {over})'

    def neurons(self, blocks: Sequence[Layer]) -> str:
        """A further argument: the name of a table of an MLP's linears, where one serves all blocks that have any."""
        found = {tuple(name.removeprefix(f"{b.name}.") for name in mlp.weights) for b in blocks for mlp in b.neurons}
        if len(found) != 1:
            return ""
        (linears,) = found
        if linears not in self.mlps:
            self.mlps.append(linears)
        number = self.mlps.index(linears)
        return f", NEURONS_{number + 1}" if number else ", NEURONS"

    def table(self, blocks: Sequence[Layer], numbers: Sequence[int]) -> str:
        """The name of a table of groups for all `blocks`, or an expression with `i` that finds a block's own."""
        if self.shared and self.tables:
            return "GROUPS"
        own = f"GROUPS_{len(self.tables) + 1}" if self.tables else "GROUPS"
        whole = self.shared or merged([signature(block) for block in blocks])
        if self.gives(whole, blocks):
            self.tables.append(_filled(f"{own} = (", [_tuple(map(_quoted, group)) for group in whole], ")"))
            return own
        alike: dict[Signature, list[int]] = {}
        for block, number in zip(blocks, numbers):
            alike.setdefault(signature(block), []).append(number)
        rows = [f"{tuple(at)!r}: {_tuple(_tuple(map(_quoted, g)) for g in table)}" for table, at in alike.items()]
        self.tables.append(_filled(f"{own} = {{", rows, "}"))
        return f"next(groups for at, groups in {own}.items() if i in at)"

    def helper(self, blocks: Sequence[Layer]) -> str:
        """The name of a function that lists a block with experts, those that some blocks lack passed over."""
        name = f"block_{len(self.helpers) + 1}" if self.helpers else "block"
        holders = list(dict.fromkeys(holder for block in blocks for holder in experts(block)))
        whole = self.shared or merged([signature(block) for block in blocks])
        cut = _cut(blocks, whole) if self.gives(whole, blocks) else 0
        lines, parts = [f"def {name}(model, name, groups):"], []
        for holder in holders:
            if all(holder in experts(block) for block in blocks):
                parts.append(f'*Layer.of_experts(model, f"{{name}}.{holder}")')
                continue
            here = f"experts_{len(parts) + 1}" if parts else "experts"
            lines.append(f'    {here} = f"{{name}}.{holder}"')
            lines.append(
                f"    {here} = Layer.of_experts(model, {here}) if {here} in dict(model.named_modules()) else ()"
            )
            parts.append(f"*{here}")
        linears = "*Layer.of_linears(model, name, groups{}).weights"
        parts.insert(0, linears.format(f"[:{cut}]" if cut else ""))
        parts += [linears.format(f"[{cut}:]")] if cut else []
        lines.append(_filled("    return Layer(name, (", parts, "    ))"))
        self.helpers.append("\n".join(lines))
        return name


def _answer(parts: Sequence[str]) -> str:
    """The last lines of enumerate_layers."""
    if len(parts) > 1 or not parts[0].startswith("*("):
        return _filled("    return [", parts, "    ]")
    whole = f"    return [{parts[0][2:-1]}]"
    count = parts[0][:-1].rpartition(" in range(")[2][:-1]
    if len(whole) <= WIDTH or not count.startswith("len("):
        return whole
    return f"    n = {count}\n{whole.replace(count, 'n')}"


def _cut(blocks: Sequence[Layer], table: Signature) -> int:
    """How many groups of `table` a block runs before its experts, where some are run after; else 0."""
    for block in blocks:
        kinds = [weight.kind for weight in block.weights]
        if "experts" in kinds and kinds[-1] == "linear":
            behind = kinds[::-1].index("experts")
            names = {relative(weight, block) for weight in block.weights[len(kinds) - behind :]}
            return next(i for i, group in enumerate(table) if names & set(group))
    return 0


def _module(name: str) -> str:
    """The expression for a module of the model."""
    plain = all(part.isidentifier() for part in name.split("."))
    return f"model.{name}" if plain else f'model.get_submodule("{name}")'


def _kind(layer: Layer) -> str:
    return "" if layer.kind == "block" else f', kind="{layer.kind}"'


def _quoted(text: str) -> str:
    return f'"{text}"'


def _tuple(parts: Any) -> str:
    found = [part if part.startswith(("(", "Weight(", '"')) else _quoted(part) for part in parts]
    return f"({found[0]},)" if len(found) == 1 else f"({', '.join(found)})"


def _filled(start: str, parts: Sequence[str], end: str) -> str:
    """`parts` between `start` and `end` on one line, or on as few as they need."""
    comma = "," if len(parts) == 1 and start.endswith("(") else ""
    whole = f"{start}{', '.join(parts)}{comma}{end.strip()}"
    if len(whole) <= WIDTH:
        return whole
    indent = " " * (len(end) - len(end.lstrip()) + 4)
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= WIDTH:
            lines[-1] += f" {part},"
        else:
            lines.append(f"{indent}{part},")
    return "\n".join([start, *lines, textwrap.dedent(end) if not end.startswith(" ") else end])
