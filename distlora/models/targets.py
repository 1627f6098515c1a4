"""The targets of a batch: the predictions whose loss is taken."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: A batch as tensors by name, `labels` among them.
Batch = dict[str, Tensor]

#: The label of a position, or of a row, that has no loss.
IGNORE = -100


def targets_per_row(batch: Batch) -> Tensor:
    """(batch,) int64: how many targets each row has.

    A language model's `labels` are (batch, length). A row has as many targets as response tokens, not
    counting its first token, which nothing predicts. A classifier's `labels` are (batch,). A row has one
    target, or none if it has no label.
    """
    labels = batch["labels"]
    return (labels[:, 1:] != IGNORE).sum(1) if labels.ndim == 2 else (labels != IGNORE).long()


def count_targets(batch: Batch) -> int:
    return int(targets_per_row(batch).sum())


def sample_weights(batch: Batch) -> Tensor:
    """(batch,) float32: 1 / number of targets of each row, and 0 for a row without any.

    Weighted with it, the samples of a batch count alike, however they are grouped.
    """
    counts = targets_per_row(batch).float()
    return torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))


def loss_of_samples(
    loss: Callable[[nn.Module, Batch, Tensor], tuple[Tensor, int]],
) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a probe, made of a loss of training.

    loss: from (model, batch, (batch,) weights of the rows) to (weighted sum, number of targets). Returns a
    function of (model, batch): the sum of the samples' own mean losses.
    """
    return lambda model, batch: loss(model, batch, sample_weights(batch))[0]
