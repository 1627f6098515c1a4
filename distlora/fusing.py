"""Adding a low-rank matrix to any part of a weight: the arithmetic of every change that is made to a frozen weight."""

import torch
from torch import Tensor

from distlora.methods import LowRank
from distlora.rounding import Rounding, rounded

#: Elements of the exact sum that are in memory at once: 16 MiB in float32.
BLOCK_ELEMENTS = 1 << 22


@torch.no_grad()
def add_low_rank(part: Tensor, start: int, update: LowRank, rounding: Rounding, key: int, device: torch.device) -> float:
    """`W ← round(W + left @ right)` on elements [start, start + n) of the row-major W, in float32 with one cast.

    part: (n,) flat view of the stored weight, changed in place; it may begin and end in the middle of a row, and lie on another
    device than `device`, where the sum is formed. Only the rows that the part covers are computed.
    Returns the squared error ‖exact − stored‖² of the part.

    The blocks begin at rows that do not depend on the part, so the same part always sums in the same order.
    """
    left, right = update.left.to(device, torch.float32), update.right.to(device, torch.float32)
    columns = right.shape[1]
    block = max(1, BLOCK_ELEMENTS // columns)
    position, end, error = start, start + part.numel(), 0.0
    while position < end:
        row = position // columns
        last = (row // block + 1) * block
        stop = min(end, last * columns)
        first_element = row * columns
        exact = (left[row : -(-stop // columns)] @ right).view(-1)[position - first_element : stop - first_element]
        here = part[position - start : stop - start]
        exact = exact + here.to(device, torch.float32)
        stored = rounded(exact, part.dtype, rounding, key, position)
        error += float((exact - stored.float()).double().square().sum())
        here.copy_(stored)
        position = stop
    return error
