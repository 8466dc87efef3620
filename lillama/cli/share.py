"""`lillama export` and `lillama push`: a compressed checkpoint for others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lillama.errors import LillamaError


def export(args: argparse.Namespace) -> int:
    """write a compressed checkpoint in another form"""
    from lillama.base import quiet
    from lillama.registry import EXPORTS

    name = args.short or args.form
    if name is None:
        known = f"Known: {', '.join(EXPORTS)}."
        raise LillamaError(
            "say which form",
            where="export",
            hint=f"--dense multiplies the factors back, --standalone keeps them. {known}",
        )
    EXPORTS.check(name, "export")
    quiet.quiet_libraries()
    trust = {"trust_remote_code": args.trust_remote_code} if "trust_remote_code" in EXPORTS.needs(name) else {}
    EXPORTS.get(name)(Path(args.directory), Path(args.out), **trust)
    said = {
        "dense": ": loads with plain transformers, and is as large as the original",
        "standalone": ": loads with transformers by trust_remote_code=True, which runs the modelling file in it",
    }
    sys.stdout.write(f"wrote {args.out}{said.get(name, '')}\n")
    return 0


def push(args: argparse.Namespace) -> int:
    """upload a compressed checkpoint to the hub, its card with what the run measured"""
    from lillama.base import quiet

    quiet.quiet_libraries()
    from lillama.checkpoint.push import push

    options = {"private": args.private, "standalone": args.standalone, "trust": args.trust_remote_code}
    sys.stdout.write(f"wrote {push(Path(args.directory), args.repo_id, **options)}\n")
    return 0


def add_export_arguments(sub: argparse.ArgumentParser) -> None:
    """What `export` takes."""
    sub.add_argument("directory", help="a compressed checkpoint")
    sub.add_argument("out", help="the directory to write")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that came with the model")
    forms = sub.add_mutually_exclusive_group()
    forms.add_argument("--as", dest="form", metavar="NAME", help="the form: dense, standalone, or a plugin's")
    for form, does in (("dense", "multiply the factors back"), ("standalone", "bring the modelling code along")):
        about = f"{does}: short for --as {form}"
        forms.add_argument(f"--{form}", dest="short", action="store_const", const=form, help=about)


def add_push_arguments(sub: argparse.ArgumentParser) -> None:
    """What `push` takes."""
    sub.add_argument("directory", help="a compressed checkpoint, or a run directory")
    sub.add_argument("repo_id", help="the model repository: USER/NAME")
    sub.add_argument("--private", action="store_true", help="a repository that is made is private")
    sub.add_argument("--standalone", action="store_true", help="as export --standalone writes it")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that came with the model")
