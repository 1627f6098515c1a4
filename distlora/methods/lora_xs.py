"""LoRA-XS: a trained r×r core between frozen singular factors of W (Bałazy et al., arXiv 2405.17604)."""

from typing import ClassVar, Literal

import torch

from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.methods.contract import Init, LayerInit, Method


class LoRAXS(Method):
    name: Literal["lora_xs"] = "lora_xs"

    summary: ClassVar[str] = "train R between the frozen singular factors of W"
    source: ClassVar[str] = "arXiv 2405.17604"
    path: ClassVar[tuple[str, ...]] = ("A", "R", "B")
    trains: ClassVar[tuple[str, ...]] = ("R",)
    at_start: ClassVar[Literal["same", "near", "moved"]] = "near"  # the core is N(0, 1e-5²)
    decomposes: ClassVar[bool] = True

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "weight"

    def initialise(self, layer: LayerInit) -> Init:
        u, s, vt = truncated_svd(layer.source, self.rank, layer.generator)
        # Σ stands on the input side, as in the authors' code.
        r = torch.randn(self.rank, self.rank, generator=layer.generator) * 1e-5
        factors = {"A": s.cpu()[:, None] * vt.cpu(), "R": r, "B": u.cpu()}
        return Init(factors, report={"captured_energy": captured_energy(layer.source, s)})
