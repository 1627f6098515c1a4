"""Rows that hold several samples, on ranks."""

import torch
from torch import Tensor

from distlora.data import collate, in_a_row, one_by_one, packed
from distlora.models.losses import response_loss
from tests.distributed.world import samples
from tests.stepping import train_step

#: Tokens of a row. The samples have up to 40.
CAPACITY = 48


def packed_rows(setting) -> dict[str, Tensor]:
    """Steps over packed rows, on one plain engine over the same samples one by one. Their micro-batches are
    fewer than those of the samples, in every step another number, and in the last step one rank has none."""
    setting.start_from_random_factors()
    engine, comm = setting.engine, setting.comm
    losses, norms = [], []
    for step, count in enumerate((12, 7, 12, 1)):
        rows = samples(count, step)
        sizes = [len(row.input_ids) for row in rows]
        if comm.world_size == 1:
            ranks = one_by_one(count, 1, setting.micro_batch, setting.accumulation).ranks
        else:
            ranks = packed(sizes, CAPACITY, comm.world_size, setting.micro_batch).ranks
            assert len(ranks[0]) == len(ranks[1]) < setting.accumulation
        own = [[[rows[place] for place in row] for row in part] for part in ranks[comm.rank]]
        made = [[in_a_row(row) if comm.world_size > 1 else row[0] for row in part] for part in own]
        batches = [collate(part, 0, comm.device) for part in made]
        loss, info = train_step(engine, batches, response_loss, setting.rate(step))
        losses.append(loss)
        norms.append(info.grad_norm)
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms)} | setting.state()
