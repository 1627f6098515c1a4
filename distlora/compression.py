"""The best pair of fewer columns: the update of one layer, cut after its largest singular values, with the error stated."""

import torch
from torch import Tensor

from distlora.linalg import factorised, low_rank_norm
from distlora.methods import LowRank

_Triplets = tuple[Tensor, Tensor, Tensor]


def compress(pair: LowRank, rank: int, dtype: torch.dtype = torch.float32) -> tuple[LowRank, float]:
    """The pair of `rank` columns nearest to `left @ right` (Eckart–Young), and its relative Frobenius error.

    pair: (out, k), (k, in). Both sides of the result carry √σ, so that neither is small, and are in `dtype`. The error is that
    of the numbers that are returned, their rounding included; 0 for an update that is zero.
    """
    return _cut(factorised(pair.left, pair.right), rank, dtype)


def compress_within(pair: LowRank, max_error: float, dtype: torch.dtype = torch.float32) -> tuple[LowRank, float]:
    """Like `compress`, with the smallest rank whose error is at most `max_error`.

    Where the rounding to `dtype` alone costs more, the answer is of full rank and its error says so. With every further rank the
    error falls, up to rounding: within that of `dtype`, a smaller rank may meet the bound by chance, and is not looked for.
    """
    triplets = factorised(pair.left, pair.right)
    low, high = _smallest_rank(triplets[1], max_error), triplets[1].numel()
    found = _cut(triplets, low, dtype)
    if found[1] <= max_error or low == high:  # where the rounding does not count
        return found
    best = _cut(triplets, high, dtype)
    if best[1] > max_error:
        return best
    # `low` misses the bound, and `high`, of which `best` is made, meets it.
    while high - low > 1:
        middle = (low + high) // 2
        found = _cut(triplets, middle, dtype)
        if found[1] <= max_error:
            high, best = middle, found
        else:
            low = middle
    return best


def _smallest_rank(sigma: Tensor, max_error: float) -> int:
    """Before any rounding: the error of rank k is the norm of what follows the k-th singular value."""
    squares = sigma.double().square()
    left_out = squares.sum() - squares.cumsum(0)
    return min(int((left_out > max_error**2 * squares.sum()).sum()) + 1, sigma.numel())


def _cut(triplets: _Triplets, rank: int, dtype: torch.dtype) -> tuple[LowRank, float]:
    u, sigma, vt = triplets
    root = sigma[:rank].sqrt()
    kept = LowRank((u[:, :rank] * root).to(dtype), (root[:, None] * vt[:rank]).to(dtype))
    norm = float(sigma.double().norm())
    difference = torch.cat([kept.left.float(), -u * sigma], 1), torch.cat([kept.right.float(), vt], 0)
    return kept, low_rank_norm(*difference) / norm if norm > 0 else 0.0
