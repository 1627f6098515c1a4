"""Bytes that packed weights need for a moment: to unpack one in a pass, and to pack one anew."""

import torch

from distlora.adapter.packed import Packing
from distlora.maths.blocks import NORM_ELEMENTS, SQUARES_ELEMENTS
from distlora.methods import HasMagnitude
from distlora.plan.setup import FLOAT32, Setup


def unpacked(setup: Setup, micro_batch: int) -> int:
    """The most that the product of one layer needs in either direction.

    These are the unpacked matrix, and copies of input and output in its type.
    """
    tokens = micro_batch * setup.length
    return max(
        (_product(setup, name, packing, tokens) for name, packing in setup.shapes.packings.items()), default=0
    )


def _product(setup: Setup, name: str, packing: Packing, tokens: int) -> int:
    copied = packing.compute != packing.storage
    product = packing.unpacking_nbytes() + (
        tokens * sum(packing.shape) * packing.compute.itemsize if copied else 0
    )
    if not isinstance(setup.method, HasMagnitude) or name not in setup.layers:
        return product
    # Before the first pass after a step the method measures the whole weight, a block of rows at a time.
    elements = packing.shape[0] * packing.shape[1]
    return max(product, packing.unpacking_nbytes(torch.float32) + FLOAT32 * min(elements, NORM_ELEMENTS))


def packed_anew(packing: Packing) -> int:
    """Bytes that a layer's owner needs to take something out of the weight and to pack the rest.

    These are the pretrained weight, the weight as it is stored, and their difference, all in float32; and two
    blocks of its squares in float64.
    """
    elements = packing.shape[0] * packing.shape[1]
    return (
        2 * FLOAT32 * elements
        + packing.unpacking_nbytes(torch.float32)
        + 4 * FLOAT32 * min(elements, SQUARES_ELEMENTS)
    )


def renewed(packing: Packing) -> int:
    """Bytes that the owner sends to all ranks when a weight is packed anew."""
    return packing.elements * packing.storage.itemsize + packing.scale_nbytes
