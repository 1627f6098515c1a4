"""What was decided about a recomposition: numbers for every layer, and the importance in a picture."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.comm import Comm
from distlora.maths.linalg import effective_rank, low_rank_norm, product_singular_values
from distlora.maths.low_rank import LowRank
from distlora.recompose.stacks import Chosen

#: Side of the square that one component of one matrix has in the picture, in pixels; less where the picture
#: would be wider than `WIDEST`.
PIXELS, WIDEST = 8, 8192
#: Colours from the least to the most important component of a layer, mixed in between.
COLOURS = ((0.27, 0.0, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14))
#: Decades below a matrix's largest score that the picture shows.
DECADES = 4


@dataclass
class Carried:
    """What is kept of a recomposition until its numbers are computed.

    errors: for every layer, this rank's share of the squared rounding error. live, begun: for the layers that
    this rank owns, what the factors add to each of its matrices now, and the negated initial values of the
    replaced components; in host memory.
    """

    errors: dict[str, float] = field(default_factory=dict)
    live: dict[str, list[LowRank]] = field(default_factory=dict)
    begun: dict[str, list[list[LowRank]]] = field(default_factory=dict)


@dataclass
class LayerRecomposition:
    """One layer at one recomposition. The names are those of the keys in `recompositions.jsonl`.

    components: numbers of the replaced components; of a stack of experts, those of each expert.
    low_half_share: share of the importance that the lower half of the components had. sigma: singular values
    of s·B·A of the new components. reserve_left: components that are still unused. rounding_loss: ‖W_exact −
    W_stored‖ / ‖what was added to W‖. rounding_loss_of_learned: the same error / ‖what the replaced
    components had learned since they were put in place‖. delta_norm, effective_rank: of the whole update of
    W0 so far; the effective rank is exp(entropy of σ/Σσ).

    Of a stack of experts the norms are those of all experts together; low_half_share and effective_rank are
    means over them, and sigma has the values of one expert after the other.
    """

    components: tuple[int, ...] | tuple[tuple[int, ...], ...]
    low_half_share: float | None = None
    sigma: list[float] = field(default_factory=list)
    reserve_left: int = 0
    update_norm: float = 0.0
    learned_norm: float = 0.0
    rounding_loss: float = 0.0
    rounding_loss_of_learned: float = 0.0
    delta_norm: float = 0.0
    effective_rank: float = 0.0


#: What only the owner of a layer knows.
OWNED = ("update_norm", "learned_norm", "delta_norm", "effective_rank")
#: What of a layer is worth a curve, beside the largest `sigma`.
SHOWN = (
    "low_half_share",
    "rounding_loss",
    "rounding_loss_of_learned",
    "delta_norm",
    "effective_rank",
    "reserve_left",
)


@dataclass
class RecompositionReport:
    """step: optimizer steps done. recomposed, reason: the decision. scores: (matrices, r) importance of every
    component, if it was followed. names: of the matrices, in the order of the rows: a layer is one, a stack
    of experts one for each. layers: what happened to each layer, if components were replaced. scalars:
    numbers about all layers together.
    """

    step: int
    recomposed: bool
    reason: str
    scores: Tensor | None
    names: list[str]
    layers: dict[str, LayerRecomposition] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """By tag, under `recompose/`: numbers about all layers together, and the mean over the layers of each
        quantity.
        """
        found = {f"recompose/{key}": value for key, value in self.scalars.items()}
        found["recompose/swapped"] = float(self.recomposed)
        return found | {
            f"recompose/{key}": sum(by.values()) / len(by) for key, by in self.by_quantity().items()
        }

    def by_quantity(self) -> dict[str, dict[str, float]]:
        """The known numbers of single layers: by quantity, and then by layer."""
        found = {key: {name: getattr(layer, key) for name, layer in self.layers.items()} for key in SHOWN}
        found["sigma"] = {name: max(layer.sigma, default=None) for name, layer in self.layers.items()}
        known = {
            key: {name: float(value) for name, value in by.items() if value is not None}
            for key, by in found.items()
        }
        return {key: by for key, by in known.items() if by}

    def record(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "step": self.step, "swapped": self.recomposed, "reason": self.reason,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }  # fmt: skip

    def picture(self) -> Tensor | None:
        """(r·8, matrices·8, 3) uint8: a column for each matrix, a row for each component, brighter where it
        matters more. With more than a thousand matrices the squares are smaller.
        """
        if self.scores is None:
            return None
        largest = self.scores.max(1, keepdim=True).values
        # Each matrix has its own scale, which is logarithmic: the scores of one span decades, and matrices
        # are not compared.
        ratio = torch.where(
            largest > 0, self.scores / largest.clamp(min=1e-300), torch.zeros_like(self.scores)
        )
        level = (1 + ratio.clamp(min=10.0**-DECADES).log10() / DECADES).T * (len(COLOURS) - 1)
        low = level.floor().clamp(max=len(COLOURS) - 2).long()
        colours = torch.tensor(COLOURS, dtype=level.dtype)
        mixed = torch.lerp(colours[low], colours[low + 1], (level - low).unsqueeze(-1))
        side = max(1, min(PIXELS, WIDEST // len(self.scores)))
        return (mixed * 255).round().to(torch.uint8).repeat_interleave(side, 0).repeat_interleave(side, 1)


def as_told(layer: AdapterLinear, chosen: Chosen) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """What a report says of the components that were chosen in each matrix of a layer."""
    return tuple(chosen) if layer.stack else chosen[0]


@dataclass(frozen=True)
class Change:
    """What a recomposition did to one matrix. All pairs are (out, k), (k, in).

    update: what was added to W; its first columns are what was fused, one for each replaced component. begun:
    their sum is the negated initial value of the same components. total: their sum is the whole update of W0.
    """

    update: LowRank
    begun: list[LowRank]
    total: list[LowRank]


def measure(layer: LayerRecomposition, matrices: list[Change], device: torch.device) -> None:
    """Computes the numbers that only the owner of a layer knows. matrices: of the layer. device: where the
    norms are computed.
    """
    first = layer.components[0]
    fused = slice(len(first) if isinstance(first, tuple) else len(layer.components))
    updates, learned, singular_values = [], [], []
    for own in matrices:
        updates.append(low_rank_norm(*_side_by_side([own.update], device)))
        learned.append(low_rank_norm(*_side_by_side([own.update.part(fused), *own.begun], device)))
        singular_values.append(product_singular_values(*_side_by_side(own.total, device)))
    layer.update_norm, layer.learned_norm = math.hypot(*updates), math.hypot(*learned)
    layer.delta_norm = float(torch.cat(singular_values).norm())
    layer.effective_rank = sum(map(effective_rank, singular_values)) / len(matrices)


def _side_by_side(pairs: list[LowRank], device: torch.device) -> tuple[Tensor, Tensor]:
    """The sum of pairs as one: (out, Σk), (Σk, in), float32."""
    left = torch.cat([pair.left.to(device, torch.float32) for pair in pairs], 1)
    return left, torch.cat([pair.right.to(device, torch.float32) for pair in pairs], 0)


def complete(comm: Comm, report: RecompositionReport, errors: dict[str, float]) -> None:
    """Gives every rank what single ranks know of the layers, in one collective. errors: this rank's shares of
    the squared rounding errors.
    """
    table = [
        [errors[name], *(float(getattr(layer, key)) for key in OWNED)]
        for name, layer in report.layers.items()
    ]
    whole = comm.all_reduce(torch.tensor(table, dtype=torch.float64, device=comm.device)).tolist()
    for layer, (error, *owned) in zip(report.layers.values(), whole):
        for key, value in zip(OWNED, owned):
            setattr(layer, key, value)
        layer.rounding_loss = error**0.5 / layer.update_norm if layer.update_norm else 0.0
        layer.rounding_loss_of_learned = error**0.5 / layer.learned_norm if layer.learned_norm else 0.0
