"""In which dtype an adapter is written: the model's, unless rounding to it changes an update by more than the
precision of that dtype explains.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from distlora.exports.sources import Compressed, Source
from distlora.maths.linalg import low_rank_norm
from distlora.maths.low_rank import LowRank

#: The largest relative change of a layer's update, in the Frobenius norm. bfloat16 rounds an element of each
#: factor by at most 2⁻⁹ of itself, and their product by twice that, unless its terms cancel each other.
TOLERANCE = 2.0**-8

_log = logging.getLogger(__name__)


def rounding_error(pair: LowRank, dtype: torch.dtype) -> float:
    """‖BA − round(B) round(A)‖ / ‖BA‖ of a pair, or of all pairs of a stack together; 0 where BA is zero."""
    found = [_squares(own, dtype) for own in pair.single()]
    changed, whole = sum(each for each, _ in found), sum(each for _, each in found)
    return (changed / whole) ** 0.5 if whole > 0 else 0.0


def _squares(pair: LowRank, dtype: torch.dtype) -> tuple[float, float]:
    left, right = pair.left.float(), pair.right.float()
    rounded: list[Tensor] = [side.to(dtype).float() for side in (left, right)]
    changed = low_rank_norm(torch.cat([left, -rounded[0]], 1), torch.cat([right, rounded[1]], 0))
    return changed**2, low_rank_norm(left, right) ** 2


def dtype_for(
    source: Source, of_model: torch.dtype, share: Callable[[float], float] = lambda worst: worst
) -> torch.dtype:
    """The model's dtype where the update of every layer keeps its numbers in it, float32 elsewhere; a line in
    the log says which, and why.

    share: gives rank 0's number to all ranks. Collective where reading the source is. Reads every pair once.
    """
    if of_model.itemsize >= torch.float32.itemsize:
        return torch.float32
    trial, worst, where = Compressed(source, of_model), 0.0, ""
    for layer in source.layers:
        pair = trial.low_rank(layer)
        if pair is not None:
            error = trial.errors.get(layer) or rounding_error(pair, of_model)
            worst, where = max((worst, where), (error, layer))
    worst, name = share(worst), str(of_model).removeprefix("torch.")
    if worst <= TOLERANCE:
        _log.info("the adapter is written in %s, which changes a layer's update by %.1e at most", name, worst)
        return of_model
    _log.info("the adapter is written in float32: %s changes the update of %s by %.1e", name, where, worst)
    return torch.float32
