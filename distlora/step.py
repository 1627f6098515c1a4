"""One optimizer step over a global batch, whatever engine runs it. The loss of this project is defined here, once."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distlora.engine import Engine, StepInfo
from distlora.errors import TrainingError

Batch = dict[str, Tensor]
#: (model, batch) to (sum of the cross-entropy over the batch's response tokens, their number).
LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]


def response_tokens(batch: Batch) -> int:
    """Number of tokens that the loss is taken over. The first position of a row is never predicted."""
    return int((batch["labels"][:, 1:] != -100).sum())


def accumulate(engine: Engine, batches: Sequence[Batch], loss_sum: LossSum) -> float:
    """Forward and backward over this rank's micro-batches of one global batch; returns the loss.

    The loss is the sum over the response tokens of the *global* batch divided by their number. Their number is known before the
    first backward pass (one all-reduce), so each micro-batch's share is exact whatever the micro-batch size, the accumulation
    and the world size; an average of micro-batch means would not be. Every rank brings equally many micro-batches; one
    without response tokens has weight zero. Raises TrainingError if the loss is not finite.
    """
    (tokens,) = engine.comm.sum(sum(map(response_tokens, batches)))
    total = torch.zeros((), dtype=torch.float64, device=engine.comm.device)
    for batch in batches:
        loss, _ = engine.run(loss_sum, batch)
        engine.backward(loss / tokens)
        total += loss.detach()
    value = float(engine.comm.all_reduce(total)) / tokens
    if not math.isfinite(value):
        raise TrainingError(f"the training loss is {value}")
    return value


def train_step(engine: Engine, batches: Sequence[Batch], loss_sum: LossSum, rate: float) -> tuple[float, StepInfo]:
    """`accumulate`, then one step of the optimizer at this learning rate; returns the loss before the step."""
    engine.set_rate(rate)
    loss = accumulate(engine, batches, loss_sum)
    return loss, engine.step()


@torch.no_grad()
def evaluation_loss(engine: Engine, batches: Sequence[Batch], loss_sum: LossSum) -> float:
    """Mean cross-entropy over all response tokens of all ranks' batches; equally many batches on every rank."""
    engine.train_mode(False)
    total, tokens = 0.0, 0
    for batch in batches:
        loss, count = engine.run(loss_sum, batch)
        total, tokens = total + float(loss), tokens + count
    total, tokens = engine.comm.sum(total, tokens)
    engine.train_mode(True)
    return total / tokens
