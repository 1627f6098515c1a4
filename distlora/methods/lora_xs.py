"""LoRA-XS: train R between the frozen singular factors of W (arXiv 2405.17604).

Bałazy et al.: the core R is r×r.
"""

from typing import ClassVar, Literal

import torch

from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.methods.contract import Init, LayerInit, Method


class LoRAXS(Method):
    name: Literal["lora_xs"] = "lora_xs"

    path: ClassVar[tuple[str, ...]] = ("A", "R", "B")
    trains: ClassVar[tuple[str, ...]] = ("R",)

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        u, s, vt = truncated_svd(layer.source, self.rank, layer.generator)
        # As in the authors' code, Σ is on the input side, and the core starts near zero.
        r = torch.randn(self.rank, self.rank, generator=layer.generator) * 1e-5
        factors = {"A": s.cpu()[:, None] * vt.cpu(), "R": r, "B": u.cpu()}
        return Init(factors, report={"captured_energy": captured_energy(layer.source, s)})
