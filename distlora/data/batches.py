"""Which samples make up a step, a pass and a tensor: deterministic, and no sample is lost or doubled.

A *global batch* holds the samples of one optimizer step. Each rank takes its share of it in a fixed number of
*passes*. A rank that has no samples left makes an empty pass of weight zero, because every rank must make the
same number of passes: under ZeRO-3 each of them is a collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.data.encode import Sample
from distlora.models.targets import IGNORE


@dataclass(frozen=True)
class PackedRow(Sample):
    """Several samples one after the other, none of which is to see another. sizes: their numbers of
    tokens."""

    sizes: tuple[int, ...] = ()


def in_a_row(samples: Sequence[Sample]) -> PackedRow:
    """The first token of each sample has no loss already, so that none is learned from the sample before."""
    ids = [token for sample in samples for token in sample.input_ids]
    labels = [label for sample in samples for label in sample.labels]
    return PackedRow(ids, labels, [], sizes=tuple(len(sample.input_ids) for sample in samples))


class TrainOrder:
    """The order in which `n` samples are trained. Its only state is the number of the step.

    Each epoch is a permutation, drawn from (seed, epoch) and cut into global batches. The last batch may be
    smaller.
    """

    def __init__(self, n: int, global_batch_size: int, seed: int):
        if n < 1 or global_batch_size < 1:
            raise ValueError(f"TrainOrder needs samples and a batch size, got {n} and {global_batch_size}")
        self.n, self.global_batch_size, self.seed = n, global_batch_size, seed
        self.steps_per_epoch = -(-n // global_batch_size)
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The samples of a step's global batch. The step, counted from 0 over all epochs, decides them."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            # This cache is no state: any step can be asked for at any time.
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._epoch = epoch
        start = batch * self.global_batch_size
        return self._permutation[start : start + self.global_batch_size].tolist()


def micro_batches(
    indices: Sequence[int], rank: int, world_size: int, micro_batch_size: int, accumulation: int
) -> list[list[int]]:
    """One rank's share of a global batch, as `accumulation` passes. The last ones may be empty (weight zero).

    The shares of the ranks are disjoint, cover the batch and differ in size by at most one sample.
    Raises ValueError if the batch does not fit into the passes.
    """
    if len(indices) > world_size * micro_batch_size * accumulation:
        raise ValueError(
            f"{len(indices)} samples do not fit into {accumulation} passes of {micro_batch_size} "
            f"on {world_size} ranks"
        )
    share = list(indices[rank::world_size])
    return [share[micro_batch_size * i : micro_batch_size * (i + 1)] for i in range(accumulation)]


def shard(n: int, rank: int, world_size: int, batch_size: int = 1) -> list[list[int]]:
    """One rank's share of samples 0 … n−1, in passes of at most `batch_size`: for evaluation and the probe.

    Every rank gets the same number of passes. A rank that lacks samples gets empty ones (weight zero).
    """
    passes = -(-n // (world_size * batch_size))
    return micro_batches(range(n), rank, world_size, batch_size, passes)


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, int64 (batch, longest), for training and
    evaluation. Of packed rows also `position_ids`, which begin anew with every sample, and with the padding
    behind the last one: that is how a model is told where samples end.

    No samples give a 1 × 2 batch of padding without a loss, for a pass of weight zero. Its attention mask is
    1: a row that may attend to nothing has a softmax over nothing, which is NaN in some kernels.
    """
    if not samples:
        ids = torch.full((1, 2), pad_id, device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORE),
        }
    ids = [sample.input_ids for sample in samples]
    batch = {
        "input_ids": pad_rows(ids, pad_id, device),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, device),
        "labels": pad_rows([sample.labels for sample in samples], IGNORE, device),
    }
    if isinstance(samples[0], PackedRow):
        longest = max(map(len, ids))
        sizes = [(*row.sizes, longest - len(row.input_ids)) for row in samples]
        positions = [[place for size in row for place in range(size)] for row in sizes]
        batch["position_ids"] = pad_rows(positions, 0, device)
    return batch


def pad_rows(rows: list[list[int]], value: int, device: torch.device | str) -> Tensor:
    """Rows of different lengths as one int64 tensor (len(rows), longest), with `value` on the right."""
    longest = max(map(len, rows))
    padded = [row + [value] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)
