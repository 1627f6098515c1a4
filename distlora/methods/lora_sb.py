"""LoRA-SB: frozen orthonormal B, A and a trained core R that starts as the best rank-r copy of the first full step.

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet", arXiv 2411.19557.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distlora.linalg import captured_energy, gram_inverse, truncated_svd
from distlora.methods.base import Factors, Init, LayerInit, Method, ProbeSettings


class FirstStep(ProbeSettings):
    """How the first step of full fine-tuning is approximated, and the paper's ablations."""

    step: Literal["adamw", "sgd"] = Field("adamw", description="ΔW = −η·sign(Σ g_i) under adamw, −η·mean g_i under sgd")
    matrix: Literal["gradient", "kaiming"] = Field(
        "gradient", description="what is factorised: the step, or a Kaiming-uniform matrix (ablation)"
    )
    noise_std: float = Field(0.0, ge=0, description="standard deviation of noise added to ΔW before the SVD (ablation)")
    orthonormal: bool = Field(True, description="false: B = UΣ, A = Vᵀ, R = I/s, without gradient correction (Eq. 11–12)")

    @model_validator(mode="after")
    def _check_eta(self):
        if self.noise_std > 0 and self.eta == "search":
            raise ValueError("noise_std is relative to a fixed step: set eta to schedule or to a number")
        if isinstance(self.eta, float) and self.eta <= 0:
            raise ValueError("eta must be positive")
        return self


class LoRASB(Method):
    name: Literal["lora_sb"] = "lora_sb"
    init: FirstStep = FirstStep()

    summary: ClassVar[str] = "train R; B, R, A start as the best rank-r copy of the first full step"
    source: ClassVar[str] = "arXiv 2411.19557"
    path: ClassVar[tuple[str, ...]] = ("A", "R", "B")
    trains: ClassVar[tuple[str, ...]] = ("R",)

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "gradient" if self.init.matrix == "gradient" else None

    def probe_settings(self) -> ProbeSettings | None:
        return self.init if self.init.matrix == "gradient" else None

    def proportional_to_eta(self) -> str | None:
        if self.init.matrix == "kaiming" or self.init.noise_std > 0:
            return None
        return "R" if self.init.orthonormal else "B"

    def initialise(self, layer: LayerInit) -> Init:
        """B = U_r, A = V_rᵀ, R = Σ_r/s of ΔW = U Σ Vᵀ (Eq. 9–10), refitted to the factors as they will be stored."""
        step = self._first_step(layer)
        u, s, vt = truncated_svd(step, self.rank, layer.generator)
        report = {"captured_energy": captured_energy(step, s), "step_rms": float(step.square().mean().sqrt())}
        if not self.init.orthonormal:
            b, r, a = u * s, torch.eye(self.rank) / self.scaling, vt
        else:
            # Cast factors are not orthonormal (bf16: ‖BᵀB − I‖ ≈ 1e-3), so R is solved for the cast ones; in float32 this is Σ_r/s.
            b, a = u.to(layer.dtype), vt.to(layer.dtype)
            r = self._best_core(step, b.float(), a.float())
        return Init({"A": a.cpu(), "R": r.cpu(), "B": b.cpu()}, report)

    def gradient_map(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """Theorem 3: the optimal gradient is `g_R* = (1/s²)(BᵀB)⁻¹ g_R (AAᵀ)⁻¹`; nothing to do where that is g_R itself."""
        if not self.init.orthonormal:
            return {}
        left, right = _grams(factors["B"].float(), factors["A"].float())
        identity = torch.eye(self.rank, device=left.device)
        if self.scaling == 1.0 and max((left - identity).abs().max(), (right - identity).abs().max()) < 1e-5:
            return {}
        return {"R": (gram_inverse(left) / self.scaling**2, gram_inverse(right))}

    def _first_step(self, layer: LayerInit) -> Tensor:
        """ΔW (out, in), float32: what the first step of full fine-tuning would add to W."""
        if self.init.matrix == "kaiming":
            bound = 1 / math.sqrt(layer.shape[1])
            step = ((torch.rand(layer.shape, generator=layer.generator) * 2 - 1) * bound).to(layer.device)
        elif self.init.step == "adamw":
            step = -layer.eta * torch.sign(layer.source)
        else:
            step = -layer.eta * layer.source
        if self.init.noise_std > 0:
            noise = torch.randn(layer.shape, generator=layer.generator)
            step = step + self.init.noise_std * noise.to(step.device)
        return step

    def _best_core(self, step: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """The R (r, r) that minimises ‖s·B R A − ΔW‖_F for given B and A."""
        left, right = _grams(b, a)
        return gram_inverse(left) @ (b.T @ step @ a.T) @ gram_inverse(right) / self.scaling


def _grams(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """BᵀB and AAᵀ, both (r, r)."""
    return b.T @ b, a @ a.T
