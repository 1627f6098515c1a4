"""A checksum of a tensor that may be taken in parts."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(part: Tensor) -> Tensor:
    """int64 scalar: the sum of the elements' bits as integers. Sums of parts add up to that of the whole."""
    return part.detach().contiguous().view(_INTEGERS[part.element_size()]).sum(dtype=torch.int64)
