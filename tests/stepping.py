"""Whole optimizer steps of an engine that a test drives by itself, without an adapter's own calls around."""

from collections.abc import Sequence

from distlora.engine import boundary
from distlora.engine.protocol import Engine, StepInfo
from distlora.models.targets import Batch
from distlora.training.step import LossSum, accumulate


def take_step(engine: Engine) -> StepInfo:
    """One step, and what belongs before and after it."""
    norm = boundary.before_step(engine)
    info = engine.step()
    boundary.after_step(engine)
    return info if norm is None else StepInfo(norm, info.skipped)


def train_step(
    engine: Engine, batches: Sequence[Batch], loss_sum: LossSum, rate: float
) -> tuple[float, StepInfo]:
    """`accumulate`, then one step at this learning rate; returns the loss before the step."""
    engine.set_rate(rate)
    loss = accumulate(engine, batches, loss_sum)
    return loss, take_step(engine)
