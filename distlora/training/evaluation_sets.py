"""The sets that a run is evaluated on: that of `data.eval_split`, or those of `data.eval` by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.recipe.sections import Recipe
from distlora.training.objective import Responses, objective_of
from distlora.training.objective_base import Objective


@dataclass(frozen=True)
class SetOfSamples:
    """name: before each of its scores; "" for the only one. samples: of its split, all of them."""

    name: str
    objective: Objective
    samples: list


def sets_of(recipe: Recipe, objective: Objective) -> dict[str, Objective]:
    """By name, what each set asks of the model; its split is its recipe's `data.eval_split`. objective: the
    run's. Raises UserError for a task of another kind."""
    if recipe.data.eval is None:
        return {"": objective} if recipe.data.eval_split else {}
    found = {}
    for name, section in recipe.data.evaluation_sections.items():
        of_set = found[name] = objective_of(recipe.model_copy(update={"data": section}))
        alike = type(of_set) is type(objective) or (
            isinstance(of_set, Responses) and isinstance(objective, Responses)
        )
        if not alike or of_set.labels != objective.labels:
            raise UserError(
                f"data.eval.{name}: the task {section.task} asks something else of a model than "
                f"{recipe.data.task}, which is trained; name a task of the same kind"
            )
    return found


def score_names(sets: Mapping[str, Objective]) -> tuple[str, ...]:
    """What an evaluation on these sets answers."""
    return tuple(
        key
        for name, objective in sets.items()
        for key in _named(name, dict.fromkeys(objective.score_names()))
    )


def scores_of_sets(
    sets: list[SetOfSamples], engine: Engine, preprocessor, limit: int | None
) -> dict[str, float]:
    """See `Objective.evaluate`, of at most so many samples of each set. Collective."""
    found: dict[str, float] = {}
    for each in sets:
        found |= _named(each.name, each.objective.evaluate(engine, preprocessor, each.samples[:limit]))
    return found


def generated_scores(sets: list[SetOfSamples], engine: Engine, preprocessor) -> dict[str, float]:
    """See `Objective.generate`. Collective."""
    found: dict[str, float] = {}
    for each in sets:
        found |= _named(each.name, each.objective.generate(engine, preprocessor, each.samples))
    return found


def _named(name: str, scores: dict) -> dict:
    return {f"{name}/{key}" if name else key: value for key, value in scores.items()}


def worst_loss(scores: Mapping[str, float]) -> float:
    """Of an evaluation: the largest loss of a set, NaN if one is, or if there is none."""
    losses = [value for key, value in scores.items() if key.rpartition("/")[2] == "loss"]
    return math.nan if any(map(math.isnan, losses)) else max(losses, default=math.nan)
