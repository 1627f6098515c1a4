"""One optimizer step over a global batch, whatever engine runs it. The loss of this project is defined here,
once.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distlora.engine.protocol import Engine
from distlora.errors import TrainingError
from distlora.models.targets import Batch, count_targets

#: (model, batch) to (sum of the cross-entropy over the batch's targets, their number).
LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]


def accumulate(
    engine: Engine,
    batches: Sequence[Batch],
    loss_sum: LossSum,
    mark: Callable[[str], None] = lambda part: None,
) -> float:
    """Forward and backward over this rank's micro-batches of one global batch; returns the loss.

    The loss is the sum over the targets of the *global* batch (response tokens, or rows with a label) divided
    by their number. Their number is known before the first backward pass (one all-reduce), so each
    micro-batch's share is exact whatever the micro-batch size, the accumulation and the world size; an
    average of micro-batch means would not be. Every rank brings equally many micro-batches; one without
    targets has weight zero. Raises TrainingError if the loss is not finite, and Preempted after a micro-batch
    in which a rank was asked to stop: then the gradients so far are of no use. mark: is told when a "forward"
    or a "backward" pass is over, this with the wait for other ranks.
    """
    (targets,) = engine.comm.sum(sum(map(count_targets, batches)))
    total = 0.0
    for number, batch in enumerate(batches, start=1):
        loss, _ = engine.run(loss_sum, batch)
        mark("forward")
        engine.backward(loss / targets, last=number == len(batches))
        total += engine.comm.sum_or_stop(float(loss.detach()))[0]
        mark("backward")
    value = total / targets
    if not math.isfinite(value):
        raise TrainingError(f"the training loss is {value}")
    return value


@torch.no_grad()
def evaluation_loss(engine: Engine, batches: Sequence[Batch], loss_sum: LossSum) -> float:
    """Mean cross-entropy over all targets of all ranks' batches; equally many batches on every rank. Raises
    Preempted between two of them."""
    engine.train_mode(False)
    total, targets = 0.0, 0.0
    for batch in batches:
        loss, count = engine.run(loss_sum, batch)
        loss, count = engine.comm.sum_or_stop(float(loss), count)
        total, targets = total + loss, targets + count
    engine.train_mode(True)
    return total / targets
