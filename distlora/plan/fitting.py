"""The fastest usual settings of a recipe that fit into a machine's memory, each of them planned."""

from collections.abc import Callable, Iterator
from itertools import product

from distlora.errors import UserError
from distlora.plan.advice import fits
from distlora.plan.columns import Plan, plan_of
from distlora.plan.memory import GIB
from distlora.plan.shapes import Shapes, shapes_of
from distlora.recipe.sections import Recipe
from distlora.training.adapter_start import with_start

#: Micro-batches with or without activation checkpointing, from the fastest to the smallest.
_BATCHES = ((8, False), (4, False), (8, True), (4, True), (2, True), (1, True))
#: DeepSpeed configs to try, in this order; None is the plain engine of one process.
_ALONE, _TOGETHER = (None, "zero3_offload"), ("zero2", "zero3", "zero3_offload")

#: deepspeed, micro_batch_size, gradient_checkpointing, quantization, as the recipe's keys want them.
Settings = tuple[str | None, int, bool, str | None]


def fitting(
    recipe_with: Callable[[Settings], Recipe], gpus: int, memory: float, batch: int, offload: bool = True
) -> tuple[Settings, Plan]:
    """The first settings whose plan fits, and the plan.

    recipe_with: makes the recipe of some settings. gpus: of the one machine; 1 where it computes on its
    processor. memory: GiB of one. batch: samples of a step, which the ranks share. offload: whether there is
    another memory to put weights into. Raises UserError where nothing fits, and where the recipe is wrong.
    """
    shapes: dict[str | None, Shapes] = {}
    smallest = None
    for settings in _candidates(gpus, batch, offload):
        recipe = with_start(recipe_with(settings))
        packed = settings[3]
        try:
            if packed not in shapes:
                shapes[packed] = shapes_of(recipe)
            plan = plan_of(recipe, 1, gpus, shapes=shapes[packed])
        except UserError:
            if packed is None:
                raise
            continue  # such as a method that needs the weights as they are
        if fits(plan, memory):
            return settings, plan
        smallest = min(smallest or plan, plan, key=lambda plan: plan.memory.peak)
    least = "" if smallest is None else f": the smallest takes {smallest.memory.peak / GIB:.1f} GiB"
    raise UserError(
        f"model.path={recipe.model.path} does not fit into {gpus} x {memory:g} GiB with any usual "
        f"setting{least}; take more or larger GPUs, shorter texts, or a smaller model"
    )


def _candidates(gpus: int, batch: int, offload: bool) -> Iterator[Settings]:
    engines = [name for name in (_ALONE if gpus == 1 else _TOGETHER) if offload or name != "zero3_offload"]
    most = max(1, batch // gpus)
    batches = [(size, checkpointing) for size, checkpointing in _BATCHES if size <= most]
    for packed, engine, (size, checkpointing) in product((None, "nf4"), engines, batches):
        if packed is None or engine != "zero3_offload":
            yield engine, size, checkpointing, packed
