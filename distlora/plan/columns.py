"""One recipe on several clusters, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from distlora.errors import UserError
from distlora.plan.memory import Memory, memory_of
from distlora.plan.setup import Setup, setup_of
from distlora.plan.shapes import Shapes, shapes_of
from distlora.plan.traffic import (
    Traffic,
    init_traffic,
    recomposition_traffic,
    search_traffic,
    step_traffic,
)
from distlora.recipe.sections import Recipe
from distlora.training.adapter_start import with_start


@dataclass(frozen=True)
class Plan:
    """One column: a recipe on one cluster of `nodes` times `gpus` GPUs.

    step, init, search, recomposition: bytes sent, by kind of collective. search: of one try of the line
    search.
    """

    setup: Setup
    nodes: int
    gpus: int
    memory: Memory
    step: Traffic
    init: Traffic
    search: Traffic
    recomposition: Traffic

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus


def plan_of(
    recipe: Recipe, nodes: int, gpus: int, samples: int | None = None, shapes: Shapes | None = None
) -> Plan:
    """The plan for one cluster. Raises UserError where the recipe cannot run on it.

    samples: of the training set, where `data.split` does not say it. shapes: of this recipe, if they are
    known already.
    """
    recipe, world_size = with_start(recipe), nodes * gpus
    if recipe.deepspeed is None and world_size > 1:
        raise UserError(
            f"{world_size} ranks need DeepSpeed; set deepspeed=configs/zero/zero3.json, or another config"
        )
    setup = setup_of(recipe, shapes or shapes_of(recipe), world_size, samples)
    return Plan(
        setup,
        nodes,
        gpus,
        memory_of(setup),
        step_traffic(setup),
        init_traffic(setup),
        search_traffic(setup),
        recomposition_traffic(setup),
    )


def side_by_side(
    recipe: Recipe, nodes: Sequence[int], gpus: int, samples: int | None = None
) -> list[tuple[int, Plan | UserError]]:
    """For each number of nodes the pair (nodes, plan), or (nodes, error) where the recipe cannot run.

    Raises UserError where it can run on none of them.
    """
    recipe = with_start(recipe)
    shapes, found = shapes_of(recipe), []
    for count in nodes:
        try:
            found.append((count, plan_of(recipe, count, gpus, samples, shapes)))
        except UserError as error:
            found.append((count, error))
    if all(isinstance(plan, UserError) for _, plan in found):
        raise found[0][1]
    return found
