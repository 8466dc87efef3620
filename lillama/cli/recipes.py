"""`lillama recipes`: the shipped recipes, listed or shown. Imports no torch."""

from __future__ import annotations

import argparse
import sys

from lillama.cli.console import console
from lillama.recipe import shipped


def recipes(args: argparse.Namespace) -> int:
    """list the recipes that come with lillama, or show one; `lillama run NAME` takes them by name"""
    if args.name:
        sys.stdout.write(shipped.find(args.name).read_text())
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for one in shipped.recipes().values():
        table.add_row(one.name, one.summary)
    out = console()
    out.print(table, highlight=False)
    out.print(
        "\nlillama run NAME (lillama sweep NAME for those under paper/); lillama recipes NAME shows one", markup=False
    )
    return 0
