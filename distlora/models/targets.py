"""Targets of a batch: which predictions the loss is taken over."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: A batch as tensors by name, `labels` among them.
Batch = dict[str, Tensor]

#: Label of a position, or of a row, without a loss.
IGNORE = -100


def targets_per_row(batch: Batch) -> Tensor:
    """(batch,) int64: how many predictions of each row the loss is taken over.

    `labels` (batch, length) are one a token: the row's response tokens, without the first position, which is
    never predicted. `labels` (batch,) are one a row: 1, or 0 for a row without a label.
    """
    labels = batch["labels"]
    return (labels[:, 1:] != IGNORE).sum(1) if labels.ndim == 2 else (labels != IGNORE).long()


def count_targets(batch: Batch) -> int:
    return int(targets_per_row(batch).sum())


def sample_weights(batch: Batch) -> Tensor:
    """(batch,) float32: 1 / number of targets of each sample, so that grouping samples changes nothing; 0
    without any.
    """
    counts = targets_per_row(batch).float()
    return torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))


def loss_of_samples(
    loss: Callable[[nn.Module, Batch, Tensor], tuple[Tensor, int]],
) -> Callable[[nn.Module, Batch], Tensor]:
    """From a loss with weights, (model, batch, (batch,) factors of the rows) to (sum, number of targets), the
    one of a probe: (model, batch) to the sum of the samples' own mean losses."""
    return lambda model, batch: loss(model, batch, sample_weights(batch))[0]
