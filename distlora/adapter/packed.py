"""Linear weights in 4 or 8 bits: the home of bitsandbytes.

A packed weight is two things. Its numbers are a flat tensor in the model's own dtype, whatever bits it holds,
so that ZeRO-3 cuts it up like any other parameter and no cast of the whole model touches it. Its scales are
tensors beside it, whole on every rank.

    nf4   4-bit normal floats, one scale for 64 numbers of the row-major matrix (Dettmers et al., arXiv
          2305.14314)
    int8  whole numbers -127 … 127, one scale a row (the weights of Dettmers et al., arXiv 2208.07339; here
          activations are never quantised, so that the layer and its gradients use the same matrix)
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from distlora.errors import UserError

#: Numbers that share a scale, and scales that share a scale under double quantisation: what QLoRA uses.
BLOCK, SCALES_BLOCK = 64, 256
FLOAT32 = torch.float32.itemsize


def library():
    """bitsandbytes' functions. Loaded here and not with this file, because that takes seconds and few runs
    need it.
    """
    noise = logging.getLogger("bitsandbytes")
    level = noise.level
    noise.setLevel(logging.ERROR)  # it recommends packages for products in 4 bits, which are not used here
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise UserError(
            f"model.quantization needs the package bitsandbytes ({error}); pip install 'distlora[bnb]'"
        ) from None
    finally:
        noise.setLevel(level)
    return bitsandbytes.functional


class Packing(ABC):
    """How one weight is packed, and its scales.

    shape: (out, in). storage: the dtype of the packed tensor. compute: the dtype of the matrix that `unpack`
    makes for the forward pass. Packing is deterministic; what was unpacked packs to the same codes again, but
    scales that are quantised themselves move.
    """

    kind: ClassVar[str]

    def __init__(self, shape: tuple[int, int], storage: torch.dtype, compute: torch.dtype):
        self.shape, self.storage, self.compute = shape, storage, compute

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the packed numbers."""

    @property
    @abstractmethod
    def scale_nbytes(self) -> int:
        """Bytes of the scales, which every rank holds whole; known before anything is packed."""

    @abstractmethod
    def unpacking_nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that are alive at most while `unpack` runs, its result among them."""

    @property
    def elements(self) -> int:
        """Of the packed tensor: the bytes in units of the storage dtype, rounded up."""
        return -(-self.nbytes // self.storage.itemsize)

    def pack(self, weight: Tensor) -> Tensor:
        """(elements,) in the storage dtype, of a weight (out, in) in float32 or bfloat16; on its device, as
        the new scales.
        """
        codes = self._encode(weight.contiguous())
        stored = torch.zeros(self.elements * self.storage.itemsize, dtype=torch.uint8, device=codes.device)
        stored[: self.nbytes] = codes
        return stored.view(self.storage)

    def unpack(self, stored: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in), in the compute dtype or in `dtype`. stored: what `pack` gave, whole."""
        return self._decode(stored.detach().view(torch.uint8)[: self.nbytes], dtype or self.compute)

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """All tensors that `unpack` needs beside the stored one and that depend on the weight; they may be
        overwritten in place.
        """

    @abstractmethod
    def _encode(self, weight: Tensor) -> Tensor:
        """(nbytes,) uint8; renews the scales."""

    @abstractmethod
    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """(out, in). codes: (nbytes,) uint8."""


class NF4(Packing):
    """double: the scales are stored in 8 bits, which saves 0.37 bits a number."""

    kind = "nf4"

    def __init__(
        self, shape: tuple[int, int], storage: torch.dtype, compute: torch.dtype, double: bool = True
    ):
        super().__init__(shape, storage, compute)
        self._double = double

    @property
    def nbytes(self) -> int:
        return -(-self.shape[0] * self.shape[1] // 2)

    @property
    def scale_nbytes(self) -> int:
        if not self._double:
            return FLOAT32 * self._blocks
        return self._blocks + FLOAT32 * (-(-self._blocks // SCALES_BLOCK) + 1)  # and the mean of the scales

    def unpacking_nbytes(self, dtype: torch.dtype | None = None) -> int:
        matrix = self.shape[0] * self.shape[1] * (dtype or self.compute).itemsize
        return matrix + (FLOAT32 * self._blocks if self._double else 0)  # the scales in float32

    @property
    def _blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // BLOCK)

    def scales(self) -> list[Tensor]:
        state = self._state
        return [state.absmax, state.state2.absmax, state.offset] if self._double else [state.absmax]

    def _encode(self, weight: Tensor) -> Tensor:
        codes, self._state = library().quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=self._double, quant_type="nf4"
        )
        return codes.view(-1)

    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        state = copy.copy(self._state)  # the tensors are shared
        state.dtype = dtype
        return library().dequantize_4bit(codes.unsqueeze(1), state)


class Int8(Packing):
    kind = "int8"

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def scale_nbytes(self) -> int:
        return FLOAT32 * self.shape[0]

    def unpacking_nbytes(self, dtype: torch.dtype | None = None) -> int:
        return 2 * FLOAT32 * self.nbytes  # the library multiplies twice in float32

    def scales(self) -> list[Tensor]:
        return [self._rows]

    def _encode(self, weight: Tensor) -> Tensor:
        # On an accelerator the library takes float16 alone, which large weights overflow: the rows are scaled
        # first.
        rows = weight.float().abs().amax(1)
        codes = torch.round(weight.float() * (127 / torch.where(rows > 0, rows, 1))[:, None])
        self._rows = rows
        return codes.to(torch.int8).view(torch.uint8).view(-1)

    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return (
            library().int8_vectorwise_dequant(codes.view(torch.int8).view(self.shape), self._rows).to(dtype)
        )


def packing_maker(
    kind: str, storage: torch.dtype, compute: torch.dtype | None = None, double: bool = True
) -> Callable[[tuple[int, int]], Packing]:
    """Makes the packing of a weight from its shape; sizes can be asked of it without bitsandbytes. kind: nf4
    or int8. double: of nf4's scales."""
    compute = compute or storage
    if kind == "nf4":
        return lambda shape: NF4(shape, storage, compute, double)
    return lambda shape: Int8(shape, storage, compute)


def packer(
    kind: str, storage: torch.dtype, compute: torch.dtype | None = None, double: bool = True
) -> Callable[[tuple[int, int]], Packing]:
    """`packing_maker` for packing itself. Raises UserError without bitsandbytes."""
    library()
    return packing_maker(kind, storage, compute, double)


def scale_bytes(packing: Packing) -> int:
    """What every rank holds of a packed weight beside its part of the numbers."""
    return sum(scale.nbytes for scale in packing.scales())
