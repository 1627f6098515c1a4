"""LoRA-Pro: train A and B by gradients nearest to those of full fine-tuning (arXiv 2407.18242).

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", in its efficient mode. Scaled as rsLoRA
is, or by alpha / rank.
"""

import math
from typing import Literal

from pydantic import Field

from distlora.maths.linalg import gram_spectrum, solve_sylvester
from distlora.methods.capabilities import TransformsGradients
from distlora.methods.contract import Factors
from distlora.methods.rslora import DEFAULT_ALPHA, ScaledByRoot


class LoRAPro(TransformsGradients, ScaledByRoot):
    name: Literal["lora_pro"] = "lora_pro"
    scaled_by: Literal["sqrt_rank", "rank"] = Field(
        "sqrt_rank", description="what alpha is divided by: sqrt_rank or rank"
    )

    @property
    def scaling(self) -> float:
        """s = α/√r or α/r."""
        divisor = math.sqrt(self.rank) if self.scaled_by == "sqrt_rank" else self.rank
        return (DEFAULT_ALPHA if self.alpha is None else self.alpha) / divisor

    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        """The g_A*, g_B* whose effect on W, `s(B g_A* + g_B* A)`, is nearest to g = dL/dW:

            g_A* = (1/s²)(BᵀB)⁻¹ g_A + X A
            g_B* = (1/s²)(I − P_B) g_B (AAᵀ)⁻¹ − B X        P_B = B(BᵀB)⁻¹Bᵀ

        X does not change that effect. The X that is used keeps g_A*, g_B* nearest to g_A, g_B: it solves
        `BᵀB X + X AAᵀ = −(1/s²)(BᵀB)⁻¹ g_A Aᵀ`. With pseudo-inverses all of this holds for any rank of B;
        where B = 0, g_A* = X = 0.
        """
        # In float64, because in float32 the products (not the inverses) lose 1e-3 of the effect where the
        # condition number of B is 1e3.
        a, b, g_a, g_b = (t.double() for t in (factors["A"], factors["B"], gradients["A"], gradients["B"]))
        left, right = gram_spectrum(b.T @ b), gram_spectrum(a @ a.T)
        left_inverse = left.inverse()
        g_a, g_b = g_a / self.scaling**2, g_b / self.scaling**2
        x = solve_sylvester(left, right, -left_inverse @ (g_a @ a.T))
        beside = g_b - b @ (left_inverse @ (b.T @ g_b))
        return {"A": (left_inverse @ g_a + x @ a).float(), "B": (beside @ right.inverse() - b @ x).float()}
