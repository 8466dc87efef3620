"""`lillama compress MODEL`: a run without a recipe. Imports no torch before it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lillama.base import ranks
from lillama.cli.console import console
from lillama.errors import LillamaError


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    sub.add_argument("model", metavar="MODEL", help="a hub id, a directory, a .gguf file, or package:NAME")
    sub.add_argument("--reduction", type=float, default=0.2, help="share of the parameters to remove (0.2)")
    sub.add_argument("--data", metavar="DATA", help="a file, a folder or a hub id; without it the model writes its own")
    sub.add_argument("--tokens", type=int, default=65536, help="tokens of calibration text at most (65536)")
    sub.add_argument("--out", metavar="DIR", help="where everything goes (runs/NAME-20)")
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a key of the recipe (repeatable)")
    sub.add_argument("--write-recipe", metavar="FILE", help="write the recipe that this stands for to a file too")
    sub.add_argument("--plan", action="store_true", help="show the plan and the recipe, and stop")
    sub.add_argument("--restart", action="store_true", help="discard what the run directory holds")


def compress(args: argparse.Namespace) -> int:
    """compress a model without a recipe, on data of yours or text it writes itself"""
    from lillama.base import quiet
    from lillama.base.progress import Progress
    from lillama.cli import show
    from lillama.run import oneline, pipeline

    if not 0 < args.reduction < 1:
        raise LillamaError(f"{args.reduction} is no share between 0 and 1", where="--reduction")
    quiet.quiet_libraries()
    out, place = console(), args.out or oneline.place_of(args.model, args.reduction)
    asked = oneline.Asked(args.model, args.reduction, args.data, place, args.tokens)
    overrides = [*_model(args.model), *(args.set or [])]
    recipe, prepared = _planned(asked, overrides)
    out.print(show.plan(prepared))
    if args.write_recipe:
        from lillama.base.files import write_text

        ranks.by_first(lambda: write_text(Path(args.write_recipe), _written(args, recipe)))
        out.print(f"the recipe is in {args.write_recipe}", markup=False)
    if args.plan:
        out.print(_written(args, recipe), markup=False, highlight=False)
        return 0
    result = pipeline.Run(prepared, Progress(out), restart=args.restart).execute()
    out.print(show.result(result, recipe))
    return 0


def _planned(asked: Any, overrides: list[str]) -> tuple[Any, Any]:
    """The recipe for what is asked, and its plan.

    The embedding is in the budget where the model is mostly that, neurons of MLPs where these are known.
    """
    from lillama.pretrained.ends import KEY
    from lillama.recipe.schema import Recipe
    from lillama.run import oneline, prepare

    source = prepare.open_source(Recipe.parse(oneline.recipe_of(asked, 0), overrides))

    def planned(embedding: bool, neurons: bool = False) -> tuple[Any, Any]:
        recipe = Recipe.parse(oneline.recipe_of(asked, source.parameters, embedding, neurons), overrides)
        prepared = prepare.prepare(recipe)
        if neurons or not oneline.wants_neurons(prepared.layers, source.parameters):
            return recipe, prepared
        try:
            return planned(embedding, neurons=True)
        except LillamaError as error:  # another strategy or initialiser was asked for, say
            if error.where != "compress.neurons":
                raise
        return recipe, prepared

    try:
        return planned(oneline.is_mostly_table(source.model))
    except LillamaError as error:
        if error.where != KEY:
            raise
    return planned(False)  # the model does more between its embedding and its blocks


def _model(given: str) -> list[str]:
    """Overrides for a model that is one GGUF file."""
    path = Path(given).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        return []
    return [f"model.id={path.parent.resolve()}", f"model.gguf_file={path.name}"]


def _written(args: argparse.Namespace, recipe: Any) -> str:
    """The recipe as a file: with every default written out, and the command above it."""
    evaluators = {key: _unplaced(options, recipe.run.out) for key, options in recipe.evaluate.items()}
    recipe = recipe.model_copy(update={"evaluate": evaluators})
    return f"# lillama compress {args.model} --reduction {args.reduction}\n{recipe.to_yaml()}"


def _unplaced(options: dict[str, Any], out: str) -> dict[str, Any]:
    """An evaluator's options with the run directory left open, where they have the model's own text."""
    from lillama.base.rundir import OWN_TEXT
    from lillama.recipe.schema import RUN_OUT

    own = options.get("dataset") == f"{out}/{OWN_TEXT}"
    return {**options, "dataset": f"{RUN_OUT}/{OWN_TEXT}"} if own else options
