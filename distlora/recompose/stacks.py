"""A layer as its matrices: one, or that of every expert of a stack. Methods replace components of one matrix.

The components of all matrices of a layer are numbered through: component k of matrix e is number e·r + k.
"""

from collections.abc import Sequence

from torch import Tensor

from distlora.adapter.expert_layers import of_expert, stacked
from distlora.adapter.layer import AdapterLinear
from distlora.maths.low_rank import LowRank, stacked_pairs
from distlora.methods import Factors, Recomposes, Recomposition

#: The numbers of the components that are chosen in every matrix of a layer, in its own numbers.
Chosen = list[tuple[int, ...]]


def matrices_of(layer: AdapterLinear) -> int:
    """How many matrices the layer has."""
    return len(layer.matrix_names)


def single_factors(layer: AdapterLinear, factors: Factors) -> list[Factors]:
    """The factors of every matrix of a layer; views."""
    return [of_expert(factors, expert) for expert in range(*layer.stack)] if layer.stack else [factors]


def rows_of(layers: dict[str, AdapterLinear], table: Tensor) -> dict[str, Tensor]:
    """The rows of a table with one for each matrix, (n, …), by layer; views."""
    return dict(zip(layers, table.split([matrices_of(layer) for layer in layers.values()])))


def numbered(chosen: Chosen, rank: int) -> list[int]:
    """The numbers of chosen components in the whole layer."""
    return [number * rank + component for number, own in enumerate(chosen) for component in own]


def fused(
    layer: AdapterLinear,
    method: Recomposes,
    factors: Factors,
    used: Factors,
    chosen: Chosen,
    new: LowRank | None,
) -> tuple[Factors, LowRank]:
    """The factors of a layer after `Recomposes.fuse` of each of its matrices, and what is added to W.

    new: of the whole layer. In every matrix equally many components are chosen, so the answers form a stack.
    """
    fresh = [None] * len(chosen) if new is None else new.single()
    answers = [
        method.fuse(*own)
        for own in zip(single_factors(layer, factors), single_factors(layer, used), chosen, fresh)
    ]
    return _joined(layer, answers)


def _joined(layer: AdapterLinear, answers: Sequence[Recomposition]) -> tuple[Factors, LowRank]:
    if not layer.stack:
        return answers[0].factors, answers[0].base_update
    return (
        stacked([answer.factors for answer in answers]),
        stacked_pairs(answer.base_update for answer in answers),
    )
