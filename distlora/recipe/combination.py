"""What of a recipe does not go together, as far as neither weights nor ranks are needed to see it."""

from typing import Any

from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.recipe.sections import Recipe


def check_combination(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises UserError for a method, weights, optimizer and ZeRO stage that exclude each other. config: the
    resolved DeepSpeed config, {} without DeepSpeed."""
    problem = recipe.method.problem_with_decay(recipe.train.weight_decay)
    if problem:
        raise UserError(problem)
    if recipe.train.steps:
        check_length(recipe, recipe.train.steps)
    check_base(recipe, partitioned=config.get("zero_optimization", {}).get("stage") == 3)


def check_base(recipe: Recipe, partitioned: bool) -> None:
    """Whether the weights can be stored as the recipe says. partitioned: under ZeRO-3."""
    asked = recipe.model.quantization
    if asked is None:
        return
    if asked.kind == "int8" and partitioned:
        raise UserError(
            "model.quantization: int8 does not go with ZeRO stage 3, under which 8-bit weights are reported to spoil the loss; "
            "use nf4, or stage 0-2"
        )
    problem = recipe.method.problem_with_base(asked.kind, partitioned)
    if problem:
        raise UserError(f"model.quantization: {problem}")


def check_length(recipe: Recipe, steps: int) -> None:
    """Whether the method can do with a run of so many steps."""
    problem = recipe.method.problem_with_length(steps)
    if problem:
        raise UserError(problem)
    optimizer = recipe.train.optimizer.name
    if OptimizerSpec(optimizer).eight_bit and recipe.method.switching(steps) is not None:
        raise UserError(
            f"train.optimizer.name={optimizer} keeps moments in blocks, and {recipe.method.name} as it is set here forgets those "
            f"of single components; set it to {optimizer.replace('8bit', '')}, or turn the recomposition off in method"
        )
