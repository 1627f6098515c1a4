"""Every point is checked before any of them is run."""

import json
import os
from collections.abc import Sequence

from distlora.errors import UserError
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import Recipe
from distlora.sweeps.file import Sweep
from distlora.sweeps.points import Point
from distlora.tasks import scored_tasks
from distlora.training.run_directory import check_run_dir


def check_sweep(sweep: Sweep) -> list[Recipe]:
    """The recipe of every point.

    Raises UserError, which names the point, for an override that its recipe does not take, for a directory
    that holds another run, and for two points with one directory or one content.
    """
    _check_output(sweep)
    try:
        scored_tasks(sweep.evaluation.tasks if sweep.evaluation else ())
    except UserError as error:
        raise UserError(f"{sweep.path}: evaluate: {error}") from None
    recipes = [_recipe_of(sweep, point) for point in sweep.points]
    _refuse_twins(sweep, recipes)
    return recipes


def _check_output(sweep: Sweep) -> None:
    if sweep.output.exists() and not sweep.output.is_dir():
        raise UserError(f"{sweep.path}: output: {sweep.output} is a file; name a directory")


def _recipe_of(sweep: Sweep, point: Point) -> Recipe:
    try:
        recipe = load_recipe(sweep.recipe, point.overrides)
        check_run_dir(recipe, resume=None)
    except UserError as error:
        raise UserError(f"{sweep.path}: {point.title}: {error}") from None
    return recipe


def _refuse_twins(sweep: Sweep, recipes: Sequence[Recipe]) -> None:
    directories: dict[str, Point] = {}
    contents: dict[str, Point] = {}
    for point, recipe in zip(sweep.points, recipes):
        directory = os.path.abspath(recipe.output_dir)
        first = directories.setdefault(directory, point)
        if first is not point:
            raise UserError(
                f"{sweep.path}: {first.title} and {point.title} share the output directory {directory}; "
                "leave one of them out, or give it an output_dir of its own"
            )
        content = json.dumps(recipe.model_dump(mode="json", exclude={"output_dir"}), sort_keys=True)
        first = contents.setdefault(content, point)
        if first is not point:
            raise UserError(f"{sweep.path}: {first.title} and {point.title} are the same run; leave one out")
