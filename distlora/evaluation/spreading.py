"""Which questions each rank answers at once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distlora.engine.comm import Comm
from distlora.models.generation import cache_bytes

#: Tokens of a batch on a CPU, where a larger one is no faster.
CPU_TOKENS = 1 << 14
#: Share of an accelerator's free memory that keys and values may take.
CACHE_SHARE = 0.4
#: Rows of a batch at most: beyond that, each new token is bound by arithmetic and not by reading weights.
MOST_ROWS = 256


@dataclass(frozen=True)
class BatchLimit:
    """tokens: of a batch, all its rows as long as the longest. rows: at most so many."""

    tokens: int
    rows: int = MOST_ROWS

    def fit(self, longest: int) -> int:
        """How many rows of so many tokens make up a batch; at least one."""
        return max(1, min(self.rows, self.tokens // max(longest, 1)))


def batch_limit(comm: Comm, model: nn.Module, rows: int | None = None) -> BatchLimit:
    """What fits on every rank beside what it holds now. rows: at most so many, None for the usual limit.
    Collective."""
    tokens = CPU_TOKENS
    if comm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(comm.device)
        free += torch.cuda.memory_reserved(comm.device) - torch.cuda.memory_allocated(comm.device)
        tokens = int(CACHE_SHARE * free / cache_bytes(model))
    return BatchLimit(min(comm.gather(tokens)), MOST_ROWS if rows is None else rows)


def rounds(lengths: Mapping[int, int], world_size: int, limit: BatchLimit) -> Iterator[list[list[int]]]:
    """For each round the questions of every rank. Shares differ by at most one question, and their questions
    are of about the same length.

    lengths: of each question that is to be answered, in tokens, by its number. The longest come first, so
    what does not fit into the memory shows at once, and the time left is not underestimated.
    """
    order = sorted(lengths, key=lambda index: (-lengths[index], index))
    while order:
        count = limit.fit(lengths[order[0]]) * world_size
        now, order = order[:count], order[count:]
        yield [now[rank::world_size] for rank in range(world_size)]
