"""LoRA-GA: train A and B; both start as singular directions of the first full gradient (arXiv 2407.05000).

Wang et al.: B takes other directions than A, so the first step of both together moves W along the best
rank-2r approximation of the gradient.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field

from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.maths.low_rank import LowRank
from distlora.methods.capabilities import NeedsProbe, ProbeSettings, TakesFromWeight
from distlora.methods.contract import Init, LayerInit
from distlora.methods.rslora import ScaledByRoot


class GradientProbe(ProbeSettings):
    """How the gradient is sampled."""

    eta: None = Field(
        None,
        description="always null: only directions are taken from the gradient, so there is no first step",
    )


class LoRAGA(TakesFromWeight, NeedsProbe, ScaledByRoot):
    name: Literal["lora_ga"] = "lora_ga"
    gamma: float = Field(16.0, gt=0, description="the paper's γ: both factors start at out^(1/4)/sqrt(gamma)")
    probe: GradientProbe = GradientProbe()

    zero_gradient_at_start: ClassVar[tuple[str, ...]] = ()

    def problem_with(self, out_features: int, in_features: int) -> str | None:
        least = min(out_features, in_features)
        if 2 * self.rank > least:
            return (
                f"rank {self.rank} takes 2·rank = {2 * self.rank} singular directions of the gradient, "
                f"above min(out, in) = {least}; lower method.rank"
            )
        return None

    def probe_settings(self) -> ProbeSettings:
        return self.probe

    def initialise(self, layer: LayerInit) -> Init:
        """A = V[:, :r]ᵀ and B = U[:, r:2r] of the gradient, both times out^¼/√γ; W becomes W − s·B·A.

        captured_energy: share of ‖g‖² that the first plain gradient step of A and B together can follow.
        """
        r, gradient = self.rank, layer.source.to(layer.device)
        # The official code's q: twice the directions that are used.
        u, sigma, vt = truncated_svd(gradient, min(4 * r, *layer.shape), layer.generator)
        size = layer.shape[0] ** 0.25 / math.sqrt(self.gamma)
        # Cast first: what is taken from W is then exactly what the forward pass adds again.
        b, a = ((size * half).to("cpu", layer.dtype).float() for half in (u[:, r : 2 * r], vt[:r]))
        update = LowRank(-self.scaling * b, a.clone())
        return Init({"A": a, "B": b}, {"captured_energy": captured_energy(gradient, sigma[: 2 * r])}, update)
