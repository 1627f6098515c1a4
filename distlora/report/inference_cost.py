"""What a forward pass costs: parameters, MACs and FLOPs, with adapters beside the weights and merged.
Counted by torch on the model without weights, so nothing is computed.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distlora.adapter.attach import attach
from distlora.methods import TrainsWeight
from distlora.models.hub import without_weights
from distlora.models.loading import position_limit
from distlora.recipe.sections import Recipe
from distlora.training.objective import objective_of

#: Tokens of the one sequence that is counted, fewer where the model has fewer positions.
TOKENS = 256


@dataclass(frozen=True)
class PassCost:
    """Of one forward pass over one sequence of `tokens` tokens. flops: two for each multiplication and
    addition of a matrix product; sums, norms and activations are not counted.
    """

    tokens: int
    parameters: int
    flops: int

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations."""
        return self.flops // 2


@dataclass(frozen=True)
class InferenceCost:
    """merged: the plain model. adapted: with the factors of every layer beside its weight; None where the
    weight itself is trained. trained: numbers that the run trains.
    """

    merged: PassCost
    adapted: PassCost | None
    trained: int


def inference_cost(recipe: Recipe) -> InferenceCost:
    """Of the recipe's model and method. Packed weights count as the matrices that they stand for.

    Raises UserError where the model's config cannot be read here.
    """
    place = without_weights(recipe.model.path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": place})})
    objective = objective_of(recipe)
    model = objective.bare_model().eval()
    limit = position_limit(model)
    tokens = TOKENS if limit is None else min(TOKENS, limit)
    merged = pass_cost(model, tokens)
    attach(model, recipe.method, recipe.targets, objective.head(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trains_weight = isinstance(recipe.method, TrainsWeight)
    return InferenceCost(merged, None if trains_weight else pass_cost(model, tokens), trained)


@torch.no_grad()
def pass_cost(model: nn.Module, tokens: int) -> PassCost:
    """Of a transformers model on the meta device, over input ids (1, tokens)."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    model(input_ids=ids)  # what a layer prepares once and keeps is no part of a pass
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return PassCost(tokens, parameters, counter.get_total_flops())
