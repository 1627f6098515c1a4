"""LoRA-Pro: LoRA whose gradients together come as near to the full fine-tuning gradient as A and B allow.

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242; its efficient mode.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field

from distlora.maths.linalg import gram_spectrum, solve_sylvester
from distlora.methods.contract import Factors
from distlora.methods.rslora import DEFAULT_ALPHA, RSLoRA


class LoRAPro(RSLoRA):
    name: Literal["lora_pro"] = "lora_pro"
    scaled_by: Literal["sqrt_rank", "rank"] = Field(
        "sqrt_rank", description="what alpha is divided by: sqrt_rank or rank"
    )

    summary: ClassVar[str] = (
        "train A and B, by gradients nearest to full fine-tuning's; scaled as rslora, or by alpha / rank"
    )
    source: ClassVar[str] = "arXiv 2407.18242"
    transforms_gradients: ClassVar[bool] = True

    @property
    def scaling(self) -> float:
        """s = α/√r or α/r."""
        divisor = math.sqrt(self.rank) if self.scaled_by == "sqrt_rank" else self.rank
        return (DEFAULT_ALPHA if self.alpha is None else self.alpha) / divisor

    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        """The g_A*, g_B* whose effect on W, `s(B g_A* + g_B* A)`, is nearest to g = dL/dW:

            g_A* = (1/s²)(BᵀB)⁻¹ g_A + X A        g_B* = (1/s²)(I − P_B) g_B (AAᵀ)⁻¹ − B X        P_B = B(BᵀB)⁻¹Bᵀ

        X does not change that effect; the one taken keeps g_A*, g_B* nearest to g_A, g_B:
        `BᵀB X + X AAᵀ = −(1/s²)(BᵀB)⁻¹ g_A Aᵀ`. With pseudo-inverses all of it holds for any rank of B (0:
        then g_A* = X = 0).
        """
        # All in float64: in float32 the products, not the inverses, cost 1e-3 of the effect where B's
        # condition number is 1e3.
        a, b, g_a, g_b = (t.double() for t in (factors["A"], factors["B"], gradients["A"], gradients["B"]))
        left, right = gram_spectrum(b.T @ b), gram_spectrum(a @ a.T)
        left_inverse = left.inverse()
        g_a, g_b = g_a / self.scaling**2, g_b / self.scaling**2
        x = solve_sylvester(left, right, -left_inverse @ (g_a @ a.T))
        beside = g_b - b @ (left_inverse @ (b.T @ g_b))
        return {"A": (left_inverse @ g_a + x @ a).float(), "B": (beside @ right.inverse() - b @ x).float()}
