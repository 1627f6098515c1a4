"""Numbers of 8 bits with a scale a block: how a moment is rounded to codes, and what codes mean.

An element is `table[code] · scale of its block`. A table has 256 ascending entries, of -1 … 1 or of 0 … 1.
"""

import torch
from torch import Tensor

#: Elements that share a scale.
BLOCK = 256


def decode(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """codes: (n,) uint8. scales: (n,) float32, of each element's block."""
    return table[codes.int()] * scales


def scales_of(blocks: Tensor, start: int, length: int) -> Tensor:
    """(length,) the scales of elements `start`, `start + 1`, …; blocks: one a block of the whole."""
    return blocks[torch.arange(start, start + length, device=blocks.device) // BLOCK]


def encode(values: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of the entries nearest to values (n,), and the scales (⌈n/256⌉,) of the blocks: the
    largest of each.

    scales: (n,) that the elements were decoded with, zero for one that was not. Where the blocks are the same
    as then, codes and scales come back bit for bit. The largest magnitude alone would not do: a table without
    -1 shrinks a block whose largest element is negative.
    """
    wanted = torch.maximum(scales, values.abs())
    blocks = torch.nn.functional.pad(wanted, (0, -values.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    of_elements = scales_of(blocks, 0, values.numel())
    # In a block of zeros every code means zero.
    relative = values / of_elements.where(of_elements > 0, 1.0)
    return torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8), blocks
