"""What a decision about recomposition looked like: numbers for every layer, and the importances as a picture."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from distlora.comm import Comm

#: Side of the square that one component of one layer has in the picture, in pixels.
PIXELS = 8
#: Colours from the least to the most important component of a layer; in between they are mixed.
COLOURS = ((0.27, 0.0, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14))
#: Decades below a layer's largest score that the picture tells apart.
DECADES = 4


@dataclass
class LayerSwap:
    """One layer at one swap.

    components: the numbers of those replaced. low_half_share: what the lower half of the components carried of the importance.
    sigma: the singular values of s·B·A of the new components. reserve_left: components that are still unused.
    rounding_loss: ‖W_exact − W_stored‖ / ‖what was added to W‖; rounding_loss_of_learned: the same error / ‖what the replaced
    components had learned since they were put in place‖. delta_norm, effective_rank: of the whole update of W0 so far; the
    effective rank is exp(entropy of σ/Σσ).
    """

    components: tuple[int, ...]
    low_half_share: float | None = None
    sigma: list[float] = field(default_factory=list)
    reserve_left: int = 0
    update_norm: float = 0.0
    learned_norm: float = 0.0
    rounding_loss: float = 0.0
    rounding_loss_of_learned: float = 0.0
    delta_norm: float = 0.0
    effective_rank: float = 0.0


#: Of a layer, known to its owner alone.
OWNED = ("learned_norm", "delta_norm", "effective_rank")
#: Of a layer, for TensorBoard.
SHOWN = ("low_half_share", "rounding_loss", "rounding_loss_of_learned", "delta_norm", "effective_rank", "reserve_left")


@dataclass
class SwapReport:
    """step: optimizer steps done. swapped, reason: the decision. scores: (layers, r) importance of every component, if it was
    followed. names: of the layers, in the order of the rows. layers: what happened to each, if components were replaced."""

    step: int
    swapped: bool
    reason: str
    scores: Tensor | None
    names: list[str]
    layers: dict[str, LayerSwap] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)

    def all_scalars(self) -> dict[str, float]:
        """By tag, under `recompose/`: each quantity's mean over the layers, and every layer's own."""
        found = {f"recompose/{key}": value for key, value in self.scalars.items()} | {"recompose/swapped": float(self.swapped)}
        for quantity in SHOWN:
            values = {name: getattr(layer, quantity) for name, layer in self.layers.items()}
            values = {name: float(value) for name, value in values.items() if value is not None}
            if values:
                found[f"recompose/{quantity}"] = sum(values.values()) / len(values)
                found |= {f"recompose/{quantity}/{name}": value for name, value in values.items()}
        largest = {name: max(layer.sigma) for name, layer in self.layers.items() if layer.sigma}
        if largest:
            found["recompose/sigma"] = sum(largest.values()) / len(largest)
            found |= {f"recompose/sigma/{name}": value for name, value in largest.items()}
        return found

    def record(self) -> dict:
        """All of it, as JSON."""
        return {
            "step": self.step, "swapped": self.swapped, "reason": self.reason,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }  # fmt: skip

    def picture(self) -> Tensor | None:
        """(r·8, layers·8, 3) uint8: a column for each layer, a row for each component, brighter where it matters more."""
        if self.scores is None:
            return None
        largest = self.scores.max(1, keepdim=True).values
        # A layer's own scale, logarithmic: scores of one layer span decades, and layers are not compared.
        ratio = torch.where(largest > 0, self.scores / largest.clamp(min=1e-300), torch.zeros_like(self.scores))
        level = (1 + ratio.clamp(min=10.0**-DECADES).log10() / DECADES).T * (len(COLOURS) - 1)
        low = level.floor().clamp(max=len(COLOURS) - 2).long()
        colours = torch.tensor(COLOURS, dtype=level.dtype)
        mixed = torch.lerp(colours[low], colours[low + 1], (level - low).unsqueeze(-1))
        return (mixed * 255).round().to(torch.uint8).repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)


def complete(comm: Comm, report: SwapReport, errors: dict[str, float]) -> None:
    """Brings together what single ranks know of the layers; one collective. errors: this rank's shares of the squared rounding
    errors."""
    table = [[errors[name], *(float(getattr(layer, key)) for key in OWNED)] for name, layer in report.layers.items()]
    whole = comm.all_reduce(torch.tensor(table, dtype=torch.float64, device=comm.device)).tolist()
    for layer, (error, *owned) in zip(report.layers.values(), whole):
        for key, value in zip(OWNED, owned):
            setattr(layer, key, value)
        layer.rounding_loss = error**0.5 / layer.update_norm if layer.update_norm else 0.0
        layer.rounding_loss_of_learned = error**0.5 / layer.learned_norm if layer.learned_norm else 0.0
