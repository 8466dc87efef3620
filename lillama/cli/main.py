"""`lillama`: verbs only, thin. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lillama.base import disk, ranks, stop
from lillama.cli import compress as cli_compress
from lillama.cli import plugins as cli_plugins
from lillama.cli import recipes as cli_recipes
from lillama.cli import share as cli_share
from lillama.cli.console import console
from lillama.errors import LillamaError
from lillama.version import __version__

Verb = Callable[[argparse.Namespace], int]
SAME = 2.0  # seconds in which a launcher notices that a process has ended


def _recipe(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from lillama.recipe import shipped
    from lillama.recipe.schema import Recipe

    return Recipe.load(shipped.find(args.recipe), args.set or [])


def run(args: argparse.Namespace) -> int:
    """compress a model by a recipe"""
    recipe = _recipe(args)
    from lillama.base import quiet
    from lillama.base.progress import Progress
    from lillama.cli import show
    from lillama.run import pipeline, prepare

    quiet.quiet_libraries()
    out = console()
    prepared = prepare.prepare(recipe)
    out.print(show.plan(prepared))
    result = pipeline.Run(prepared, Progress(out), restart=args.restart).execute()
    out.print(show.result(result, recipe))
    return 0


def plan(args: argparse.Namespace) -> int:
    """show ranks, parameters, memory and time; read no weights, write nothing"""
    recipe = _recipe(args)
    from lillama.base import quiet
    from lillama.cli import show
    from lillama.run import prepare

    quiet.quiet_libraries()
    config = None
    if args.config:
        config = show.read_config(args.config)
    prepared = prepare.prepare(recipe, config)
    if args.json:
        sys.stdout.write(json.dumps(prepared.plan.to_dict(), indent=2) + "\n")
    else:
        console().print(show.plan(prepared))
    return 0


def validate(args: argparse.Namespace) -> int:
    """check a recipe, or all of a sweep's, without opening a model"""
    from lillama.recipe import shipped
    from lillama.run import sweep, sweepfile

    args.recipe = shipped.find(args.recipe)
    if sweepfile.is_sweep(args.recipe):
        found, base = sweepfile.load(args.recipe)
        count = len(sweep.recipes(base, list(sweepfile.rows(found, args.set))))
        sys.stdout.write(f"{args.recipe}: valid, {count} runs\n")
        return 0
    _recipe(args)
    sys.stdout.write(f"{args.recipe}: valid\n")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """evaluate a run's result, a compressed checkpoint, or any model"""
    from lillama.base import quiet
    from lillama.cli import show
    from lillama.evaluate import measure

    quiet.quiet_libraries()
    overrides = args.set or []
    if args.tasks:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        options = {"tasks": names, "files": args.files, "limit": args.limit, "batch_size": args.batch_size}
        options = {name: value for name, value in options.items() if value is not None}
        overrides = [f"evaluate={json.dumps({'harness': options})}", *overrides]
    if args.trust_remote_code:
        overrides = ["model.trust_remote_code=true", *overrides]
    found = measure.evaluate_directory(Path(args.directory), args.recipe, overrides, args.device)
    if not ranks.is_first():
        return 0
    if args.json:
        sys.stdout.write(json.dumps(found.metrics, indent=2) + "\n")
    else:
        console().print(show.metrics(found.metrics))
    if args.out:
        from lillama.base.files import write_json

        write_json(Path(args.out), {"metrics": found.metrics, "details": found.details})
    return 0


def bench(args: argparse.Namespace) -> int:
    """time a compressed model against its original, in turn"""
    from lillama.base import quiet
    from lillama.base.files import write_json
    from lillama.cli import show
    from lillama.evaluate import bench

    quiet.quiet_libraries()
    models = bench.models_of(args.models, args.trust_remote_code)
    lengths = [int(part) for part in args.lengths.split(",")] if args.lengths else bench.LENGTHS
    settings = bench.Settings(args.batch_size, lengths, args.new_tokens, args.repeats, args.seconds)
    say = console(stderr=True).print
    found = bench.compare(models, settings, args.device, args.dtype, say)
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        console().print(show.bench(found))
    if args.out:
        write_json(Path(args.out), found)
    if models.run:
        from lillama.report import html as report

        write_json(models.run / bench.FILE, found)
        report.write(models.run)
    return 0


def sweep(args: argparse.Namespace) -> int:
    """run a recipe with every combination of chosen keys, and table the results"""
    from lillama.recipe import shipped
    from lillama.run import sweep, sweepfile

    found, base = sweepfile.load(shipped.find(args.sweep))
    out = console()
    if args.table:
        rows = sweep.collected(found)
    else:
        from lillama.base import quiet
        from lillama.base.progress import Progress

        quiet.quiet_libraries()
        rows = sweep.run(found, base, Progress(out), args.set)
    from lillama.run import sweeptable

    out.print(sweeptable.terminal(sweeptable.table(found, rows)))
    return 1 if any(row.error for row in rows) else 0


def report(args: argparse.Namespace) -> int:
    """write one HTML file that says what a run did"""
    from lillama.report import html as report

    sys.stdout.write(f"wrote {report.write(Path(args.directory))}\n")
    return 0


def schema(args: argparse.Namespace) -> int:
    """print the JSON schema of recipes, for editors"""
    from lillama.recipe import reference

    sys.stdout.write(reference.markdown() if args.markdown else json.dumps(reference.schema(), indent=2) + "\n")
    return 0


def verify(args: argparse.Namespace) -> int:
    """compare every file of a run or a checkpoint with the hash it was written with"""
    from lillama.base.progress import Progress
    from lillama.cli import verify

    return verify.verify(Path(args.directory), Progress(console(stderr=True)))


def doctor(args: argparse.Namespace) -> int:
    """say what is installed, which device and kernels are used, and what recipes lack"""
    from lillama.cli import doctor

    out = console()
    out.print(doctor.report(args.recipes), highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: a verb's own default would undo `lillama --debug VERB`.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser = argparse.ArgumentParser(
        prog="lillama",
        description="Compress pretrained models by low-rank feature distillation (arXiv 2412.16719).",
        epilog="Start with: lillama run quickstart, or: lillama compress MODEL",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"lillama {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(function: Verb, name: str = "") -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name or function.__name__, help=function.__doc__, description=function.__doc__, parents=[common]
        )
        added.set_defaults(verb=function)
        return added

    def takes_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", help="a recipe file (YAML), or the name of a shipped one (`lillama recipes`)")
        sub.add_argument(
            "--set",
            action="append",
            metavar="KEY=VALUE",
            help="override a key of the recipe, for example --set model.id=./mine (repeatable)",
        )

    sub = verb(run)
    takes_recipe(sub)
    sub.add_argument("--restart", action="store_true", help="discard what the run directory holds")
    cli_compress.add_arguments(verb(cli_compress.compress))
    sub = verb(plan)
    takes_recipe(sub)
    sub.add_argument("--config", metavar="FILE", help="plan for this config.json instead of the model's own")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    takes_recipe(verb(validate))
    sub = verb(cli_recipes.recipes)
    sub.add_argument("name", nargs="?", metavar="NAME", help="show this one")
    sub = verb(evaluate, "eval")
    sub.add_argument("directory", help="a run directory, a checkpoint directory, or a hub id")
    sub.add_argument("--tasks", help="measure these tasks of lm-eval alone: names with commas between; paper: its nine")
    sub.add_argument("--files", metavar="DIR", help="with --tasks: local data, files named TASK.jsonl")
    sub.add_argument("--limit", type=float, help="with --tasks: examples of each task at most")
    sub.add_argument("--batch-size", type=int, help="with --tasks: examples at once")
    sub.add_argument("--out", metavar="FILE", help="write metrics and details to this JSON file too")
    sub.add_argument("--recipe", help="take the `evaluate:` section of this recipe")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a key, such as evaluate.speed={}")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that came with the model or its recipe")
    sub.add_argument("--json", action="store_true", help="print the metrics as JSON")
    sub = verb(bench)
    sub.add_argument("models", nargs="+", metavar="DIR", help="a run directory, or ORIGINAL COMPRESSED")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that came with the models")
    sub.add_argument("--lengths", metavar="N,N,...", help="lengths of the prompts (512 to 16384, doubling)")
    sub.add_argument("--batch-size", type=int, default=4, help="prompts at once")
    sub.add_argument("--new-tokens", type=int, default=32, help="tokens to write")
    sub.add_argument("--repeats", type=int, default=3, help="how often to measure each")
    sub.add_argument("--seconds", type=float, default=300, help="leave out lengths that would take longer")
    sub.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--out", metavar="FILE", help="write it to this JSON file too (a run directory gets bench.json)")
    sub = verb(sweep)
    sub.add_argument("sweep", help="a sweep file (YAML): base, axes, out; or the name of a shipped one")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a key in every run (repeatable)")
    sub.add_argument("--table", action="store_true", help="run nothing, show what there is")
    sub = verb(report)
    sub.add_argument("directory", help="a run directory")
    cli_plugins.add_arguments(verb(cli_plugins.plugins), common)
    sub = verb(schema)
    sub.add_argument("--markdown", action="store_true", help="print the reference page docs/recipe.md instead")
    cli_share.add_export_arguments(verb(cli_share.export))
    cli_share.add_push_arguments(verb(cli_share.push))
    sub = verb(verify)
    sub.add_argument("directory", help="a run directory, or a checkpoint directory")
    sub = verb(doctor)
    sub.add_argument("recipes", nargs="*", help="recipes to check (default: recipes/*.yaml)")
    return parser


def _join(verb: Verb) -> None:
    """Meet the other processes of the command, where a launcher started several."""
    if ranks.launched() and verb not in (run, evaluate, cli_compress.compress):
        raise LillamaError(
            f"lillama {verb.__name__} works in one process",
            where="the launcher",
            hint="Start it without. Several can share the verbs run, compress and eval.",
        )
    ranks.join()


def _say(error: LillamaError) -> int:
    """Tell the user of a mistake; the exit status. Of several processes that make the same one the first tells."""
    lost = isinstance(error, ranks.LostError) and ranks.said_of_missing()
    ranks.leave()
    if not (lost or (ranks.is_first() and os.environ.get("RANK", "0") == "0")):  # the name before they have met
        time.sleep(SAME)  # if it was the first's too, the launcher ends this one meanwhile
    if not isinstance(error, ranks.SaidError):
        sys.stderr.write(ranks.named(f"lillama: {error}\n"))
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one message and exit status 2."""
    from lillama.base import quiet

    quiet.quiet_imports()
    args = _parser().parse_args(argv, argparse.Namespace(debug=False))
    # Threads that spin while they wait starve whatever shares the machine; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    verb: Verb = args.verb
    advice = stop.GO_ON if verb in (run, sweep, cli_compress.compress) else ""
    try:
        with stop.signals(advice):
            _join(verb)
            try:
                status = verb(args)
                ranks.disband()
                return status
            except ranks.LostError as error:  # told at once: the launcher's signal is on its way
                return _say(error)
    except LillamaError as error:
        if args.debug:
            raise
        return _say(error)
    except KeyboardInterrupt as stopped:
        number = stopped.signal if isinstance(stopped, stop.Stopped) else signal.SIGINT
        ranks.leave()
        sys.stderr.write(stop.message(number, advice))
        return stop.CODES[number]
    except BrokenPipeError:
        return 141
    except OSError as error:
        found = disk.trouble(error, Path.cwd())
        if args.debug or found is None:
            raise
        sys.stderr.write(f"lillama: {found}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
