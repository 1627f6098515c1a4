"""What a forward pass costs: parameters, MACs and FLOPs, with adapters beside the weights and merged.
Counted by torch on the model without weights, so nothing is computed.
"""

from dataclasses import dataclass

from distlora.adapter.attach import attach
from distlora.maths.known_values import known_values
from distlora.methods import TrainsWeight
from distlora.models.dry_run import position_limit
from distlora.models.hub import without_weights
from distlora.models.pass_cost import PassCost, pass_cost
from distlora.models.targets import Batch
from distlora.recipe.sections import Recipe
from distlora.training.objective import objective_of
from distlora.training.targets import chosen_in

#: Tokens of the one text that is counted, fewer where the model has fewer positions.
TOKENS = 256


@dataclass(frozen=True)
class InferenceCost:
    """sample: what passes through, in words. merged: the plain model. adapted: with the factors of every
    layer beside its weight; None where the weight itself is trained. trained: numbers that the run trains.
    """

    sample: str
    merged: PassCost
    adapted: PassCost | None
    trained: int


def inference_cost(recipe: Recipe) -> InferenceCost:
    """Of the recipe's model and method. Packed weights count as the matrices that they stand for.

    Raises UserError where the model's config cannot be read here, and for a model that needs its weights to
    be run.
    """
    place = without_weights(recipe.model.path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": place})})
    objective = objective_of(recipe)
    model = objective.bare_model().eval()
    limit = position_limit(model)
    with known_values():
        inputs = objective.meta_sample(model, TOKENS if limit is None else min(TOKENS, limit))
        merged = pass_cost(model, inputs)
        targets = chosen_in(model, recipe, objective).layers
        attach(model, recipe.method, targets, objective.trained_whole(model))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        trains_weight = isinstance(recipe.method, TrainsWeight)
        adapted = None if trains_weight else pass_cost(model, inputs)
    return InferenceCost(_in_words(inputs), merged, adapted, trained)


def _in_words(inputs: Batch) -> str:
    if "pixel_values" in inputs:
        height, width = inputs["pixel_values"].shape[-2:]
        return f"image of {height} × {width} pixels"
    return f"sequence of {inputs['input_ids'].shape[-1]} tokens"
