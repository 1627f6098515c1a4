"""Numbers in 8 bits, with a scale for each block: how they are rounded to codes, and what codes mean.

An element is `table[code] · scale of its block`. A table has 256 ascending entries in -1 … 1 or in 0 … 1.
This is the format of bitsandbytes; the blocks have nothing to do with those of `distlora.maths.blocks`.
"""

import torch
from torch import Tensor

#: Elements that share a scale.
BLOCK = 256


def decode(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The elements (n,) float32. codes: (n,) uint8. scales: (n,) float32, each that of the element's
    block.
    """
    return table[codes.int()] * scales


def scales_of(blocks: Tensor, start: int, length: int) -> Tensor:
    """The scales (length,) of the elements `start`, `start + 1`, …. blocks: the scale of each block."""
    return blocks[torch.arange(start, start + length, device=blocks.device) // BLOCK]


def encode(values: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (n,) uint8 of the table's nearest entries, and the scales (⌈n/256⌉,) of the blocks.

    values: (n,) float32. scales: (n,), with which the elements were decoded; zero for an element that was
    not. A block's scale is the largest magnitude among its values and their old scales. So unchanged blocks
    give the same codes and scales, bit for bit. With the magnitudes alone they would not: a table without -1
    shrinks a block whose largest element is negative.
    """
    wanted = torch.maximum(scales, values.abs())
    blocks = torch.nn.functional.pad(wanted, (0, -values.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    of_elements = scales_of(blocks, 0, values.numel())
    # In a block of zeros every code means zero.
    relative = values / of_elements.where(of_elements > 0, 1.0)
    return torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8), blocks
