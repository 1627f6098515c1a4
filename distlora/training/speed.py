"""What a step costs, for the monitors: scalars of the group `system`."""

import logging
from collections.abc import Sequence

from distlora.engine.comm import Comm
from distlora.engine.peaks import peak_flops
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.maths.known_values import known_values
from distlora.methods import TrainsWeight
from distlora.models.pass_cost import pass_cost
from distlora.recipe.sections import Recipe
from distlora.training.objective_base import Objective
from distlora.training.summary import peak_memory_here

log = logging.getLogger(__name__)

#: Samples whose mean length stands for that of all.
LOOKED_AT = 256
GIB = 2**30


class Speed:
    """flops_per_unit: floating-point operations that training takes for a token, or for an image. peak: of
    one rank's device, a second. Both None where the utilisation is not told.
    """

    def __init__(
        self, comm: Comm, samples: int, flops_per_unit: float | None = None, peak: float | None = None
    ):
        """samples: of a global batch."""
        self._comm, self._samples, self._flops, self._peak = comm, samples, flops_per_unit, peak

    def scalars(self, seconds: dict[str, float], amount: int, unit: str) -> dict[str, float]:
        """By tag. seconds: of the step's parts, see `StepClock`. amount: tokens or images of all ranks'
        batches. Speed and seconds are those of this step alone, and the memory is that of this rank.
        """
        total = max(seconds["total"], 1e-9)
        found = {f"seconds/{part}": value for part, value in seconds.items()}
        found |= {"samples_per_second": self._samples / total, f"{unit}_per_second": amount / total}
        found["peak_memory_gib"] = peak_memory_here(self._comm.device) / GIB
        if self._flops and self._peak:
            found["model_flops_utilisation"] = (
                amount * self._flops / (total * self._peak * self._comm.world_size)
            )
        return {f"system/{key}": value for key, value in found.items()}


def speed_of(engine: Engine, recipe: Recipe, objective: Objective, samples: Sequence) -> Speed:
    """Of a run's steps. samples: for training."""
    peak, flops = peak_flops(engine.comm.device, engine.dtype), None
    if peak is not None and engine.comm.is_main:
        flops = training_flops(recipe, objective, samples)
    return Speed(engine.comm, recipe.train.global_batch_size, flops, peak)


def training_flops(recipe: Recipe, objective: Objective, samples: Sequence) -> float | None:
    """Floating-point operations for each token, or image, of training. None for a model that cannot be
    counted without its weights.

    A forward pass counts once, and the backward pass as much again, since frozen weights have no gradients;
    twice as much where the weights themselves are trained. What is computed a second time to save memory is
    not counted, nor are the factors of an adapter.
    """
    lengths = [len(sample.input_ids) for sample in samples[:LOOKED_AT] if hasattr(sample, "input_ids")]
    units = max(1, round(sum(lengths) / len(lengths))) if lengths else 1
    try:
        model = objective.bare_model().eval()
        with known_values():
            forward = pass_cost(model, objective.meta_sample(model, max(units, 2))).flops
    except UserError as error:
        log.info("no utilisation of the device is told: %s", error)
        return None
    passes = 3 if isinstance(recipe.method, TrainsWeight) else 2
    return passes * forward / (max(units, 2) if lengths else 1)
