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
from distlora.training.evaluate import check_tasks
from distlora.training.evaluated import Asked, Subject
from distlora.training.train import check_run


def check_sweep(sweep: Sweep) -> list[Recipe]:
    """The recipe of every point.

    Raises UserError, which names the point, for all that its training and its evaluation would refuse before
    ranks meet, on any number of ranks; and for two points with one directory or one content.
    """
    _check_output(sweep)
    asked = _asked(sweep)
    recipes = [_recipe_of(sweep, point) for point in sweep.points]
    _refuse_twins(sweep, recipes)
    for point, recipe in zip(sweep.points, recipes):
        _check_point(sweep, point, recipe, asked)
    return recipes


def _check_output(sweep: Sweep) -> None:
    if sweep.output.exists() and not sweep.output.is_dir():
        raise UserError(f"{sweep.path}: output: {sweep.output} is a file; name a directory")


def _asked(sweep: Sweep) -> Asked:
    """The evaluation of every point."""
    wanted = sweep.evaluation
    if wanted is None:
        return Asked()
    try:
        names = [*wanted.tasks, *scored_tasks(wanted.tasks)]
    except UserError as error:
        raise UserError(f"{sweep.path}: evaluate: {error}") from None
    for name in wanted.data:
        if name not in names:
            raise UserError(
                f"{sweep.path}: evaluate.data: {name} is not among the tasks; add it, or leave it out"
            )
    return Asked(tuple(wanted.tasks), tuple(wanted.data.items()), wanted.limit, wanted.batch_size)


def _recipe_of(sweep: Sweep, point: Point) -> Recipe:
    try:
        return load_recipe(sweep.recipe, point.overrides)
    except UserError as error:
        raise UserError(f"{sweep.path}: {point.title}: {error}") from None


def _check_point(sweep: Sweep, point: Point, recipe: Recipe, asked: Asked) -> None:
    place = f"{sweep.path}: {point.title}"
    try:
        # What is wrong for one rank is wrong for any number.
        recipe, objective = check_run(recipe, world_size=1, resume=None)
        if asked.tasks:
            place += ": evaluate"
            check_tasks(Subject(recipe, recipe.data, frozenset(), None, run=True), recipe, asked, objective)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


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
