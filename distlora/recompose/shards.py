"""Tensors with one element for each element of a trained factor. Every rank keeps what belongs to its own
part of the factor.

Whole tensors exist only for a moment, on the way to a checkpoint and back.
"""

import torch
from torch import Tensor

from distlora.engine.comm import Comm
from distlora.engine.protocol import Part


def assembled(
    comm: Comm, shape: tuple[int, ...], part: Part | None, values: Tensor | None, owner: int
) -> Tensor:
    """The whole tensor, float32 on rank `owner`'s device; what the other ranks get is undefined. Collective.

    part: this rank's of the factor, None where it holds nothing. values: (n,), what belongs to that part.
    """
    flat = torch.zeros(torch.Size(shape).numel(), device=comm.device)
    if part is not None and part.counted:
        flat[part.start : part.start + values.numel()] = values
    return comm.reduce_to(flat, owner).view(shape)


def own_values(comm: Comm, shape: tuple[int, ...], part: Part | None, whole: Tensor | None) -> Tensor | None:
    """What belongs to this rank's part of the factor, (n,); None where it holds nothing. Collective. whole:
    on rank 0.
    """
    everywhere = torch.zeros(shape, device=comm.device)
    if comm.is_main:
        everywhere.copy_(whole)
    comm.broadcast(everywhere, 0)
    return None if part is None else everywhere.view(-1)[part.start : part.start + part.master.numel()]
