"""PiSSA: train the leading singular directions of W (arXiv 2404.02948).

Meng et al.: the rest of W is frozen.
"""

from typing import Literal

import torch
from torch import Tensor

from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.maths.low_rank import LowRank
from distlora.methods.capabilities import TakesFromWeight
from distlora.methods.contract import Init, LayerInit


class PiSSA(TakesFromWeight):
    name: Literal["pissa"] = "pissa"

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        """B = U√(σ/s), A = √(σ/s)Vᵀ of the r leading triplets of W; W becomes W − s·B·A (Eq. 2–4)."""
        u, sigma, vt = truncated_svd(layer.source.to(layer.device), self.rank, layer.generator)
        return self._begin(
            balanced(u, sigma, vt, self.scaling, layer.dtype), captured_energy(layer.source, sigma)
        )

    def _begin(self, leading: LowRank, energy: float, reserve: LowRank | None = None) -> Init:
        """The factors, and what is taken out of W for them. leading: the first B and A, already cast, so that
        the forward pass adds exactly what is taken.
        """
        b, a = leading.left.float(), leading.right.float()
        return Init(
            {"A": a, "B": b}, {"captured_energy": energy}, LowRank(-self.scaling * b, a.clone()), reserve
        )


def balanced(u: Tensor, sigma: Tensor, vt: Tensor, scaling: float, dtype: torch.dtype) -> LowRank:
    """Components with `s·B·A = U diag(σ) Vᵀ`, of which each factor has half: B = U√(σ/s), A = √(σ/s)Vᵀ. Cast
    to `dtype`, on the CPU.
    """
    root = (sigma / scaling).sqrt()
    return LowRank((u * root).to("cpu", dtype), (root[:, None] * vt).to("cpu", dtype))
