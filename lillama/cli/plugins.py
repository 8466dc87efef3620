"""`lillama plugins`, `plugins check` and `plugins trace`. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lillama.cli.console import console
from lillama.errors import LillamaError

Verb = Callable[[argparse.Namespace], int]


def plugins(args: argparse.Namespace) -> int:
    """list the plugins installed, and what is wrong with any; check one, or begin one from a model"""
    from rich.table import Table

    from lillama import host, registry

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("plugin", "distribution", "version", "hooks"):
        table.add_column(column)
    troubles = []
    for name in registry.PLUGINS:
        plugin = host.get().plugins[name]
        hooks = f"not used: {plugin.failure}" if plugin.failure else ", ".join(plugin.hooks)
        table.add_row(plugin.name, plugin.distribution, plugin.version, hooks)
        if plugin.details and args.debug:
            troubles.append(plugin.details)
    out = console()
    out.print(table, highlight=False)
    for text in troubles:
        out.print(text, markup=False, highlight=False)
    return 0


def check(args: argparse.Namespace) -> int:
    """try everything the plugin contract promises on a tiny model; exit status 1 where something fails"""
    from lillama.base import quiet
    from lillama.base.progress import Progress
    from lillama.cli import check

    name = check.make_known(args.name)
    quiet.quiet_libraries()
    wanted = check.Wanted(name, Path(args.model), args.data, args.large)
    return check.check(wanted, Progress(console()), args.debug)


def trace(args: argparse.Namespace) -> int:
    """print the blocks of a model, their weights by common input, and a plugin file that lists them"""
    from lillama.base import quiet
    from lillama.cli import pluginfile, trace

    quiet.quiet_libraries()
    model, layers, auto = trace.traced(args.model, args.trust_remote_code)
    said, text = trace.summary(layers), pluginfile.plugin_file(model, layers, auto)
    if args.out is None:
        sys.stdout.write(f"{said}\n\n{text}")
        return 0
    file = Path(args.out)
    if file.exists():
        raise LillamaError("there is such a file already", where=args.out, hint="Remove it, or give another name.")
    file.write_text(text)
    sys.stdout.write(f"{said}\n\nwrote {file}; next: lillama plugins check {file} --model DIR_OF_A_TINY_MODEL\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Give `lillama plugins` its own verbs."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(function: Verb) -> argparse.ArgumentParser:
        about = function.__doc__
        added = verbs.add_parser(function.__name__, help=about, description=about, parents=[common])
        added.set_defaults(verb=function)
        return added

    sub = verb(check)
    sub.add_argument("name", metavar="NAME", help="an installed plugin, or the file of one that is not: ./mine.py")
    sub.add_argument("--model", required=True, metavar="DIR", help="a tiny model that the plugin knows, with weights")
    sub.add_argument("--data", metavar="DATASET", help="what the plugin's own calibration stream reads, if it has one")
    sub.add_argument("--large", action="store_true", help="check on a model of more than 50 million parameters too")
    sub = verb(trace)
    sub.add_argument("model", metavar="MODEL", help="a model's directory or hub id; its weights are not read")
    sub.add_argument("--out", metavar="FILE", help="write the plugin to this file instead of printing it")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with the model")
