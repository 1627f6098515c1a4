"""PiSSA: train the leading singular directions of W, freeze the rest (Meng et al., arXiv 2404.02948)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.maths.low_rank import LowRank
from distlora.methods.contract import Init, LayerInit, TakenFromWeight


class PiSSA(TakenFromWeight):
    name: Literal["pissa"] = "pissa"

    summary: ClassVar[str] = "train the leading singular directions of W"
    source: ClassVar[str] = "arXiv 2404.02948"
    under_decay: ClassVar[str] = "decays pretrained directions"
    decomposes: ClassVar[bool] = True

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        """B = U√(σ/s), A = √(σ/s)Vᵀ of the r leading triplets of W; W becomes W − s·B·A (Eq. 2–4)."""
        u, sigma, vt = truncated_svd(layer.source.to(layer.device), self.rank, layer.generator)
        return self._begin(
            balanced(u, sigma, vt, self.scaling, layer.dtype), captured_energy(layer.source, sigma)
        )

    def _begin(self, leading: LowRank, energy: float, reserve: LowRank | None = None) -> Init:
        """leading: the first B and A, already cast, so that what is taken from W is what the forward pass
        adds again.
        """
        b, a = leading.left.float(), leading.right.float()
        return Init(
            {"A": a, "B": b}, {"captured_energy": energy}, LowRank(-self.scaling * b, a.clone()), reserve
        )


def balanced(u: Tensor, sigma: Tensor, vt: Tensor, scaling: float, dtype: torch.dtype) -> LowRank:
    """Components of which `s·B·A = U diag(σ) Vᵀ`, each half of σ: B = U√(σ/s), A = √(σ/s)Vᵀ, cast to `dtype`,
    on the CPU.
    """
    root = (sigma / scaling).sqrt()
    return LowRank((u * root).to("cpu", dtype), (root[:, None] * vt).to("cpu", dtype))
