"""Which components matter: scores of single elements, followed through training, and their means over a
component.

A component is one column of a factor (out, r), whose axis of components is 1, and the same row of a factor
(r, in), whose axis of components is 0. A *part* is a flat piece of one factor, as a rank of a partitioned
model holds it: elements `start … start + length − 1` of the row-major factor. It may begin and end inside a
row. In a stack of E factors each has components of its own: component k of factor e has the number e·r + k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: "mean" and "uncertainty", each of the shape of the part that it follows.
ScoreState = dict[str, Tensor]


@dataclass(frozen=True)
class ElementScores:
    """Smoothed sensitivity times its uncertainty (Zhang et al., "AdaLoRA", arXiv 2303.10512, as SRLoRA uses
    it).

    `I = |w·g|`, `Ī ← β₁Ī + (1−β₁)I`, `Ū ← β₂Ū + (1−β₂)|I − Ī|` with the new Ī, `s(w) = Ī·Ū`. This is
    elementwise, so any part of a factor can be followed on its own.
    """

    beta1: float = 0.85
    beta2: float = 0.85

    def start(self, part: Tensor) -> ScoreState:
        """The state before the first update: zeros in float32, of the part's shape and on its device."""
        return {key: torch.zeros_like(part, dtype=torch.float32) for key in ("mean", "uncertainty")}

    @torch.no_grad()
    def update(self, state: ScoreState, weight: Tensor, gradient: Tensor) -> None:
        """Counts one optimizer step, in place. gradient: averaged and unscaled, as the optimizer uses it."""
        sensitivity = (weight.float() * gradient.float()).abs_()
        state["mean"].lerp_(sensitivity, 1 - self.beta1)
        state["uncertainty"].lerp_(sensitivity.sub_(state["mean"]).abs_(), 1 - self.beta2)

    def scores(self, state: ScoreState) -> Tensor:
        """s(w) of every element of the part."""
        return state["mean"] * state["uncertainty"]


def component_sums(axis: int, scores: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """A part's share of means in `S_k = mean_i s(B_ik) + mean_j s(A_kj)`: (r,) float64; of a stack (E·r,).

    axis: the one that counts components, in a single factor. scores: of the part's elements, flat. shape: of
    the whole factor, or of the whole stack, with E before it. Sums over the part are divided by the full
    length of a component, so the answers for all parts of both factors add up to S.
    """
    if len(shape) == 3:
        return _component_sums_of_stack(axis, scores, start, shape)
    rows, columns = shape
    # Whole rows, padded with zeros before and after the part: no index per element is needed, and the order
    # of sums is the same for every part.
    before, after = start % columns, -(start + scores.numel()) % columns
    whole = torch.nn.functional.pad(scores.reshape(-1), (before, after)).view(-1, columns)
    if axis == 1:
        return whole.sum(0, dtype=torch.float64) / rows
    sums = torch.zeros(rows, dtype=torch.float64, device=scores.device)
    first = start // columns
    sums[first : first + whole.shape[0]] = whole.sum(1, dtype=torch.float64) / columns
    return sums


def _component_sums_of_stack(axis: int, scores: Tensor, start: int, shape: tuple[int, int, int]) -> Tensor:
    """One factor after the other, each summed in the order in which it would be alone."""
    count, *own = shape
    size, end = own[0] * own[1], start + scores.numel()
    sums = torch.zeros(count, own[axis], dtype=torch.float64, device=scores.device)
    for number in range(start // size, -(-end // size)):
        first, last = max(start, number * size), min(end, (number + 1) * size)
        sums[number] = component_sums(axis, scores[first - start : last - start], first - number * size, own)
    return sums.view(-1)


def component_of(
    axis: int | None, start: int, length: int, shape: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Number of the component that each element of a part belongs to: (length,) int64.

    axis: the one that counts components. None for a factor that belongs to all components, which are then
    replaced together: the number of the first for every element. shape: of the whole factor, or of the whole
    stack.
    """
    index = torch.arange(start, start + length, device=device)
    *_, rows, columns = shape
    if axis == 0:
        return index // columns  # the rows of a stack are numbered through
    factor = index // (rows * columns)
    return factor * columns + (index % columns if axis == 1 else 0)


def low_half_share(scores: Tensor) -> float:
    """Share of the total score that the ⌊r/2⌋ components with the lowest carry, 0 … 0.5. scores: (r,), not
    negative.

    Where every score is zero, all components have equal shares.
    """
    half, total = scores.numel() // 2, float(scores.sum())
    return float(scores.sort().values[:half].sum()) / total if total > 0 else half / scores.numel()
