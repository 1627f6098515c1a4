"""From float32 to a stored dtype: to the nearest value, or at random so that the mean is exact.

Stochastic rounding draws from a counter-based generator: the random bits of an element are a hash of a key
and of the element's flat index in the whole matrix. So all shards, devices and repetitions draw the same
bits.
"""

import hashlib
import json
from typing import Literal

import torch
from torch import Tensor

from distlora.maths.blocks import ROUNDING_ELEMENTS, row_blocks

Rounding = Literal["nearest", "stochastic"]

#: Bits that bfloat16 drops from float32.
_DROPPED = 16


def rounding_key(seed: int, layer: str, number: int) -> int:
    """The key, 0 … 2⁶³−1, of one rounding of one layer's weight.

    number: counts the roundings of the layer, so that no two of them draw the same bits.
    """
    text = json.dumps([seed, layer, number])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rounded(exact: Tensor, dtype: torch.dtype, rounding: Rounding, key: int, first: int) -> Tensor:
    """A flat piece of a matrix in the dtype that it is stored in.

    exact: (n,) float32. key: from `rounding_key`; only stochastic rounding uses it. first: the index of
    exact[0] in the whole matrix, `row·in + column`. Values that `dtype` can represent do not change.
    Stochastic rounding goes up or down to a neighbour, with the probability that makes the mean exact. Raises
    ValueError for stochastic rounding to a dtype other than float32 and bfloat16.
    """
    if dtype == torch.float32:
        return exact
    if rounding == "nearest":
        return exact.to(dtype)
    if dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16, not {dtype}")
    result = torch.empty_like(exact, dtype=dtype)
    for block in row_blocks(exact.numel(), 1, ROUNDING_ELEMENTS):
        result[block] = _stochastic_bfloat16(exact[block], key, first + block.start)
    return result


def _stochastic_bfloat16(exact: Tensor, key: int, first: int) -> Tensor:
    """(n,) float32 to bfloat16: random bits are added below the kept ones, then the lower half is cut off.

    A float's bits are a sign and a magnitude. So the kept magnitude grows by one unit with a probability that
    is the cut-off part of this unit.
    """
    draws = _random_bits(key, first, exact.numel(), exact.device)
    bits = (exact.contiguous().view(torch.int32) + draws.to(torch.int32)) & -(1 << _DROPPED)
    # With bits added, a NaN might become infinite or zero.
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact).to(torch.bfloat16)


def _random_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Uniform integers 0 … 2¹⁶−1 for counters first … first+count−1: (count,) int64.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), at these
    positions of the sequence that starts from `key`. The upper bits are taken, which are mixed best. All
    operations are on integers, so all devices agree.
    """
    z = torch.arange(first + 1, first + count + 1, device=device)
    z.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_(_shifted_right(z, shift)).mul_(_signed(factor))
    return _shifted_right(z.bitwise_xor_(_shifted_right(z, 31)), 64 - _DROPPED)


def _shifted_right(z: Tensor, shift: int) -> Tensor:
    """A shift that fills with zeros. The shift of int64 itself repeats the sign."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word
