"""What packed weights take for a while, in bytes: the matrix that a pass makes of one, and what is left of
one packed anew.
"""

import torch

from distlora.adapter.packed import Packing
from distlora.maths.linalg import BLOCK_ELEMENTS, NORM_BLOCK_ELEMENTS
from distlora.plan.setup import FLOAT32, Setup


def unpacked(setup: Setup, micro_batch: int) -> int:
    """The most that the product of one layer takes in either direction: the matrix, and copies of input and
    output in its type.
    """
    tokens = micro_batch * setup.recipe.data.max_length
    return max(
        (_product(setup, name, packing, tokens) for name, packing in setup.shapes.packings.items()), default=0
    )


def _product(setup: Setup, name: str, packing: Packing, tokens: int) -> int:
    copied = packing.compute != packing.storage
    product = packing.unpacking_nbytes() + (
        tokens * sum(packing.shape) * packing.compute.itemsize if copied else 0
    )
    if not setup.method.prepares or name not in setup.layers:
        return product
    # Before its first pass after a step: what the method wants to know of the whole weight, a block of rows
    # at a time.
    elements = packing.shape[0] * packing.shape[1]
    return max(
        product, packing.unpacking_nbytes(torch.float32) + FLOAT32 * min(elements, NORM_BLOCK_ELEMENTS)
    )


def packed_anew(packing: Packing) -> int:
    """On the owner of a layer out of whose weight something is taken: the pretrained weight, what is stored
    of it, and their difference, all in float32; and two blocks of its squares in float64."""
    elements = packing.shape[0] * packing.shape[1]
    return (
        2 * FLOAT32 * elements
        + packing.unpacking_nbytes(torch.float32)
        + 4 * FLOAT32 * min(elements, BLOCK_ELEMENTS)
    )


def renewed(packing: Packing) -> int:
    """Bytes that travel from the owner to everyone when a weight is packed anew."""
    return packing.elements * packing.storage.itemsize + packing.scale_nbytes
