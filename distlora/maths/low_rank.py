"""Low-rank matrices, kept as a pair: how one is added to a weight, and its best approximation of lower rank.

Every change of a frozen weight is such a matrix.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.maths.blocks import SUM_ELEMENTS, rows_of_block
from distlora.maths.linalg import factorised, low_rank_norm
from distlora.maths.rounding import Rounding, rounded


@dataclass(frozen=True)
class LowRank:
    """A matrix `left @ right`, kept as the pair. left: (out, k), right: (k, in). Of a stack of matrices these
    are (E, out, k) and (E, k, in).
    """

    left: Tensor
    right: Tensor

    @property
    def columns(self) -> int:
        """k."""
        return self.right.shape[-2]

    def part(self, which: slice) -> "LowRank":
        """Some of the columns of left, with the rows of right that belong to them; views."""
        return LowRank(self.left[..., which], self.right[..., which, :])

    def single(self) -> "list[LowRank]":
        """The pairs of a stack, or the pair itself; views."""
        return list(map(LowRank, self.left, self.right)) if self.left.dim() == 3 else [self]


def add_pair(weight: Tensor, pair: LowRank, times: int = 1) -> Tensor:
    """`W + times · left @ right` in float32, of a weight (out, in) or a stack of them (E, out, in)."""
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    return add(weight.float(), pair.left.float(), pair.right.float(), alpha=times)


def stacked_pairs(pairs: Iterable[LowRank]) -> LowRank:
    """Pairs with equally many columns as one stack."""
    pairs = list(pairs)
    return LowRank(torch.stack([pair.left for pair in pairs]), torch.stack([pair.right for pair in pairs]))


def pair_norm(pair: LowRank) -> float:
    """‖left @ right‖ (Frobenius) of a pair, or of all pairs of a stack together."""
    norms = [low_rank_norm(own.left, own.right) for own in pair.single()]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


@torch.no_grad()
def add_low_rank(
    part: Tensor, start: int, update: LowRank, rounding: Rounding, key: int, device: torch.device
) -> float:
    """`W ← round(W + left @ right)` on elements [start, start + n) of the row-major W, in float32 with one
    cast.

    part: (n,) flat view of the stored weight, changed in place. It may begin and end within a row, and be on
    another device than `device`, where the sum is formed. Only the rows of the part are computed. rounding,
    key: see `rounded`. Returns the squared error ‖exact − stored‖² of the part.

    Blocks begin at rows that do not depend on the part, so the same part is always summed in the same order.
    """
    left, right = update.left.to(device, torch.float32), update.right.to(device, torch.float32)
    columns = right.shape[1]
    block = rows_of_block(columns, SUM_ELEMENTS)
    position, end, error = start, start + part.numel(), 0.0
    while position < end:
        row = position // columns
        last = (row // block + 1) * block
        stop = min(end, last * columns)
        first_element = row * columns
        exact = (left[row : -(-stop // columns)] @ right).view(-1)[
            position - first_element : stop - first_element
        ]
        here = part[position - start : stop - start]
        exact = exact + here.to(device, torch.float32)
        stored = rounded(exact, part.dtype, rounding, key, position)
        error += float((exact - stored.float()).double().square().sum())
        here.copy_(stored)
        position = stop
    return error


#: U, S and Vᵀ, as from `factorised`.
_Triplets = tuple[Tensor, Tensor, Tensor]


def compress(pair: LowRank, rank: int, dtype: torch.dtype = torch.float32) -> tuple[LowRank, float]:
    """The pair of `rank` columns nearest to `left @ right` (Eckart–Young), and its relative Frobenius error.

    pair: (out, k), (k, in). Both sides of the result are in `dtype`, and both hold √σ, so that neither is
    small. The error includes the rounding to `dtype`; it is 0 for an update that is zero.
    """
    return _cut(factorised(pair.left, pair.right), rank, dtype)


def compress_within(
    pair: LowRank, max_error: float, dtype: torch.dtype = torch.float32
) -> tuple[LowRank, float]:
    """Like `compress`, with the smallest rank whose error is at most `max_error`.

    If the rounding to `dtype` alone has a larger error, the result has full rank, and its error says so. The
    error falls with the rank, up to the rounding: a smaller rank may meet the bound by chance, and is not
    looked for.
    """
    triplets = factorised(pair.left, pair.right)
    low, high = _smallest_rank(triplets[1], max_error), triplets[1].numel()
    found = _cut(triplets, low, dtype)
    if found[1] <= max_error or low == high:  # the rounding makes no difference
        return found
    best = _cut(triplets, high, dtype)
    if best[1] > max_error:
        return best
    # `low` misses the bound. `high` meets it, and `best` is its pair.
    while high - low > 1:
        middle = (low + high) // 2
        found = _cut(triplets, middle, dtype)
        if found[1] <= max_error:
            high, best = middle, found
        else:
            low = middle
    return best


def _smallest_rank(sigma: Tensor, max_error: float) -> int:
    """The smallest rank that meets the bound before any rounding.

    The error of rank k is the norm of the singular values after the k-th one.
    """
    squares = sigma.double().square()
    left_out = squares.sum() - squares.cumsum(0)
    return min(int((left_out > max_error**2 * squares.sum()).sum()) + 1, sigma.numel())


def _cut(triplets: _Triplets, rank: int, dtype: torch.dtype) -> tuple[LowRank, float]:
    """The pair of the first `rank` triplets in `dtype`, and its relative error."""
    u, sigma, vt = triplets
    root = sigma[:rank].sqrt()
    kept = LowRank((u[:, :rank] * root).to(dtype), (root[:, None] * vt[:rank]).to(dtype))
    norm = float(sigma.double().norm())
    difference = torch.cat([kept.left.float(), -u * sigma], 1), torch.cat([kept.right.float(), vt], 0)
    return kept, low_rank_norm(*difference) / norm if norm > 0 else 0.0
