"""LoRA-SB: train R; B, R, A start as the best rank-r copy of the first full step (arXiv 2411.19557).

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet". B and A are orthonormal and
frozen.
"""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distlora.maths.linalg import captured_energy, gram_inverse, squared_norm, truncated_svd
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import FixedSchedule, every_steps, fixed_steps
from distlora.maths.rounding import Rounding
from distlora.methods.capabilities import (
    CorrectsGradients,
    NeedsProbe,
    ProbeSettings,
    Recomposes,
    Recomposition,
)
from distlora.methods.contract import Factors, Init, LayerInit


class FirstStep(ProbeSettings):
    """How the first step of full fine-tuning is approximated, and the paper's ablations."""

    step: Literal["adamw", "sgd"] = Field(
        "adamw", description="ΔW = −η·sign(Σ g_i) under adamw, −η·mean g_i under sgd"
    )
    matrix: Literal["gradient", "kaiming"] = Field(
        "gradient", description="what is factorised: the step, or a Kaiming-uniform matrix (ablation)"
    )
    noise_std: float = Field(
        0.0, ge=0, description="standard deviation of noise added to ΔW before the SVD (ablation)"
    )
    orthonormal: bool = Field(True, description="false: B = UΣ, A = Vᵀ, R = I/s (Eq. 11–12, ablation)")
    optimal_gradient: bool | None = Field(
        None, description="whether R's gradient is made optimal (Theorem 3); null: as orthonormal is"
    )

    @property
    def corrects_gradient(self) -> bool:
        return self.orthonormal if self.optimal_gradient is None else self.optimal_gradient

    @model_validator(mode="after")
    def _check_eta(self) -> Self:
        if self.noise_std > 0 and self.eta == "search":
            raise ValueError("noise_std is relative to a fixed step: set eta to schedule or to a number")
        if isinstance(self.eta, float) and self.eta <= 0:
            raise ValueError("eta must be positive")
        return self


class RecomposeSettings(BaseModel):
    """When `s·B R A` is fused into W and the adapter starts anew, from the gradients of that moment.

    This is SRLoRA's idea for LoRA-SB: the trained core explores more than one subspace of r dimensions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    times: int | None = Field(None, ge=1, description="recompositions, spread evenly over the run")
    interval: int | None = Field(None, ge=1, description="steps between two recompositions, instead of times")
    start: Literal["step", "zero"] = Field(
        "step",
        description="step: with an approximated step, as at first; zero: with R = 0, so that the function is "
        "kept",
    )
    rounding: Rounding = Field(
        "nearest", description="of the frozen weight: nearest, or stochastic, which is unbiased"
    )

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if (self.times is None) == (self.interval is None):
            raise ValueError("set either times or interval")
        return self

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps after which the adapter starts anew in a run of `total` steps; never the last one."""
        return fixed_steps(total, self.times) if self.times else every_steps(total, self.interval)


class LoRASB(NeedsProbe, CorrectsGradients, Recomposes):
    name: Literal["lora_sb"] = "lora_sb"
    init: FirstStep = FirstStep()
    recompose: RecomposeSettings | None = Field(None, description="null: the adapter starts once")

    @model_validator(mode="after")
    def _starts_anew_from_gradients(self) -> Self:
        if self.recompose is None:
            return self
        if self.init.matrix != "gradient":
            raise ValueError(
                f"recompose starts anew from gradients: set init.matrix to gradient, not {self.init.matrix}"
            )
        if self.recompose.start == "zero" and (self.init.noise_std > 0 or not self.init.orthonormal):
            raise ValueError(
                "recompose.start=zero needs orthonormal factors without noise: "
                "set init.orthonormal to true, noise_std to 0"
            )
        return self

    path: ClassVar[tuple[str, ...]] = ("A", "R", "B")
    trains: ClassVar[tuple[str, ...]] = ("R",)

    # ------------------------------------------------------------------ initialisation

    def source_matrix(self) -> Literal["weight", "gradient", None]:
        return "gradient" if self.init.matrix == "gradient" else None

    def probe_settings(self) -> ProbeSettings | None:
        return self.init if self.init.matrix == "gradient" else None

    def proportional_to_eta(self) -> str | None:
        if self.init.matrix == "kaiming" or self.init.noise_std > 0:
            return None
        return "R" if self.init.orthonormal else "B"

    def initialise(self, layer: LayerInit) -> Init:
        """B = U_r, A = V_rᵀ, R = Σ_r/s of ΔW = U Σ Vᵀ (Eq. 9–10), with R fitted to B and A as they are
        stored.
        """
        step = self._first_step(layer)
        u, s, vt = truncated_svd(step, self.rank, layer.generator)
        report = {
            "captured_energy": captured_energy(step, s),
            "step_rms": math.sqrt(squared_norm(step) / step.numel()),
        }
        if not self.init.orthonormal:
            b, r, a = u * s, torch.eye(self.rank) / self.scaling, vt
        else:
            # Cast factors are not orthonormal (bfloat16: ‖BᵀB − I‖ ≈ 1e-3), so R is solved for the cast ones.
            # In float32 it is Σ_r/s.
            b, a = u.to(layer.dtype), vt.to(layer.dtype)
            r = self._best_core(step, b.float(), a.float())
        return Init({"A": a.cpu(), "R": r.cpu(), "B": b.cpu()}, report)

    def gradient_map(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """Theorem 3: the optimal gradient is `g_R* = (1/s²)(BᵀB)⁻¹ g_R (AAᵀ)⁻¹`; nothing to do where that is
        g_R itself.
        """
        if not self.init.corrects_gradient:
            return {}
        left, right = _grams(factors["B"].float(), factors["A"].float())
        identity = torch.eye(self.rank, device=left.device)
        if self.scaling == 1.0 and max((left - identity).abs().max(), (right - identity).abs().max()) < 1e-5:
            return {}
        return {"R": (gram_inverse(left) / self.scaling**2, gram_inverse(right))}

    # ------------------------------------------------------------------ recomposition

    @property
    def recomposes(self) -> bool:
        return self.recompose is not None

    def recomposition_schedule(self, steps: int) -> FixedSchedule:
        return FixedSchedule(self.recompose.steps(steps))

    def problem_with_length(self, steps: int) -> str | None:
        wanted = self.recompose.steps(steps)
        if wanted and 0 not in wanted and len(set(wanted)) == len(wanted):
            return None
        return (
            f"method.recompose does not fit into a run of {steps} steps; "
            "lower times or interval, or set more steps"
        )

    def refill_from(self) -> Literal["reserve", "gradient", "restart"]:
        return "restart"

    def keeps_function_at_restart(self) -> bool:
        return self.recompose.start == "zero"

    def update_rounding(self) -> Rounding:
        return self.recompose.rounding

    def choose(self, scores: Tensor | None) -> tuple[int, ...]:
        return tuple(range(self.rank))

    def fuse(
        self, factors: Factors, used: Factors, replaced: tuple[int, ...], new: LowRank | None
    ) -> Recomposition:
        """All of `s·B R A` goes into W, and R becomes zero."""
        return Recomposition(factors | {"R": torch.zeros_like(factors["R"])}, self.delta(used), replaced)

    # ------------------------------------------------------------------ the first step

    def _first_step(self, layer: LayerInit) -> Tensor:
        """ΔW (out, in), float32, on the device: what the first step of full fine-tuning would add to W.

        Computed in place, because a second matrix of this size would raise the peak above that of training.
        """
        if self.init.matrix == "kaiming":
            bound = 1 / math.sqrt(layer.shape[1])
            step = ((torch.rand(layer.shape, generator=layer.generator) * 2 - 1) * bound).to(layer.device)
        elif self.init.step == "adamw":
            step = layer.source.to(layer.device, copy=True).sign_().mul_(-layer.eta)
        else:
            step = layer.source.to(layer.device, copy=True).mul_(-layer.eta)
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
