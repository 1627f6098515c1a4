"""SRLoRA: PiSSA; unimportant components are fused into W and replaced by unused ones (arXiv 2505.12433).

"SRLoRA: Subspace Recomposition in Low-Rank Adaptation". Beyond the paper: an adaptive schedule, and new
components from the current gradient, like LoRA-SB's first step (arXiv 2411.19557).
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distlora.maths.importance import ElementScores
from distlora.maths.linalg import captured_energy, truncated_svd
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import (
    AdaptiveSchedule,
    FixedSchedule,
    RecompositionSchedule,
    every_steps,
    fixed_steps,
    freeze_start,
)
from distlora.maths.rounding import Rounding
from distlora.methods.capabilities import ProbeSettings, Recomposes, Recomposition
from distlora.methods.contract import Factors, Init, LayerInit
from distlora.methods.pissa import PiSSA, balanced


class AdaptiveSettings(BaseModel):
    """When `schedule: adaptive` replaces components."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(10, ge=1, description="steps over which the training loss is averaged")
    improvement: float = Field(
        0.005, ge=0, lt=1, description="replace when the loss improves by no more than this share a window"
    )
    share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="replace while the lower half of the components carries less than this of the importance",
    )
    freeze_fraction: float = Field(
        0.1, ge=0, lt=1, description="last share of the run in which nothing is replaced"
    )


class RefillProbe(ProbeSettings):
    """How the gradients of `refill: gradient` are sampled."""

    eta: None = Field(
        None, description="always null: a replacement preserves the function, so it takes no first step"
    )


class SRLoRA(Recomposes, PiSSA):
    name: Literal["srlora"] = "srlora"
    target_rank: int | None = Field(
        None,
        ge=1,
        description="directions explored in all, which bound the replacements; null: four times the rank, or "
        "what W has",
    )
    gamma: float = Field(0.5, gt=0, le=1, description="share of the components that is replaced at a time")
    interval: int | None = Field(
        None, ge=1, description="steps between replacements; null: as target_rank and schedule say"
    )
    schedule: Literal["fixed", "adaptive", "none"] = Field(
        "fixed", description="when to replace; none: plain PiSSA"
    )
    adaptive: AdaptiveSettings = AdaptiveSettings()
    refill: Literal["spectrum", "gradient"] = Field(
        "spectrum",
        description="new components: the next singular triplets of W, or the leading ones of the current "
        "gradient",
    )
    probe: RefillProbe = RefillProbe()
    rounding: Rounding = Field(
        "nearest", description="how W is written in bfloat16; stochastic: right on average"
    )
    fuse_into: Literal["base", "sidecar"] | None = Field(
        None,
        description="where fused components go: into W, or beside it as pairs; null: beside a quantised W, "
        "else into it",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.schedule == "none":
            return self
        if self.replaced_at_once < 1:
            least = math.ceil(1000 / self.rank) / 1000
            raise ValueError(
                f"gamma={self.gamma:g} of rank {self.rank} is no component: set it to at least {least:g}"
            )
        if (
            self.schedule == "adaptive"
            and self.interval is not None
            and self.interval < 2 * self.adaptive.window
        ):
            least = 2 * self.adaptive.window
            raise ValueError(
                f"interval={self.interval} is shorter than two windows of adaptive.window: "
                f"set it to at least {least}"
            )
        least = self.rank + self.replaced_at_once
        if self.directions < least:
            raise ValueError(
                f"target_rank={self.target_rank} leaves nothing to replace with: set it to at least {least}"
            )
        return self

    # ------------------------------------------------------------------ sizes

    @property
    def replaced_at_once(self) -> int:
        """⌊γ·r⌋ components of every layer."""
        return int(self.gamma * self.rank + 1e-9)  # 0.29 · 100 is 28.999999999999996

    @property
    def directions(self) -> int:
        """r_target; four times the rank while it is open and no layer is known."""
        return 4 * self.rank if self.target_rank is None else self.target_rank

    @property
    def most_recompositions(self) -> int:
        """n_switch = ⌊(r_target − r)/⌊γ·r⌋⌋."""
        return (self.directions - self.rank) // self.replaced_at_once if self.recomposes else 0

    def fitted(self, shapes: Sequence[tuple[int, int]]) -> "SRLoRA":
        """An open `target_rank` is bounded by the smallest layer: W has min(out, in) singular directions, and
        all layers are recomposed together.
        """
        if self.target_rank is not None:
            return self
        there = [min(shape) for shape in shapes] if self._has_reserve else []
        return self.model_copy(update={"target_rank": min([self.directions, *there])})

    def problem_with(self, out_features: int, in_features: int) -> str | None:
        least, unused = min(out_features, in_features), min(out_features, in_features) - self.rank
        if self._has_reserve and 0 <= unused < self.replaced_at_once:
            return (
                f"rank {self.rank} leaves {unused} of min(out, in) = {least} singular directions unused, and "
                f"{self.replaced_at_once} are replaced at a time; lower method.rank"
            )
        if self._has_reserve and self.directions > least >= self.rank:
            return f"target_rank {self.directions} is above min(out, in) = {least}; lower method.target_rank"
        return super().problem_with(out_features, in_features)

    # ------------------------------------------------------------------ initialisation

    def initialise(self, layer: LayerInit) -> Init:
        """As PiSSA; the next triplets of the same SVD, up to `target_rank`, are the reserve."""
        if not self._has_reserve:
            return super().initialise(layer)
        u, sigma, vt = truncated_svd(layer.source.to(layer.device), self.directions, layer.generator)
        all_of_them = balanced(u, sigma, vt, self.scaling, layer.dtype)
        leading, reserve = (
            _columns(all_of_them, slice(self.rank)),
            _columns(all_of_them, slice(self.rank, None)),
        )
        return self._begin(leading, captured_energy(layer.source, sigma[: self.rank]), reserve)

    @property
    def _has_reserve(self) -> bool:
        return self.recomposes and self.refill == "spectrum"

    # ------------------------------------------------------------------ when to replace, and what

    @property
    def recomposes(self) -> bool:
        return self.schedule != "none"

    def problem_with_length(self, steps: int) -> str | None:
        # Components are replaced after one of the steps 1 … last: never after the run's last step, and not
        # where an adaptive schedule is frozen.
        adaptive = self.schedule == "adaptive"
        last = (freeze_start(steps, self.adaptive.freeze_fraction) if adaptive else steps) - 1
        if last < (2 if adaptive else 1):
            return (
                f"method.schedule={self.schedule} has no room in a run of {steps} steps: "
                "set it to none, or train longer"
            )
        if self.interval is not None and self.interval > last:
            return (
                f"method.interval={self.interval} passes step {last}, the last one of {steps} "
                f"after which components are replaced: set it to at most {last}, or train longer"
            )
        if adaptive and 2 * self.adaptive.window > last:
            return (
                f"method.adaptive.window={self.adaptive.window} does not fit twice before step {last}, "
                f"the last one of {steps} after which components are replaced: "
                f"set it to at most {last // 2}, or train longer"
            )
        # While target_rank is open, the number of replacements is open too.
        if (
            self.schedule == "fixed"
            and self.interval is None
            and self.target_rank is not None
            and self.most_recompositions > last
        ):
            return (
                f"method.target_rank={self.target_rank} asks for {self.most_recompositions} replacements, "
                f"and a run of {steps} steps has room for {last}: set it to at most "
                f"{self.rank + self.replaced_at_once * steps - 1}, or train longer"
            )
        return None

    def recomposition_schedule(self, steps: int) -> RecompositionSchedule:
        most = self.most_recompositions
        if self.schedule == "adaptive":
            return AdaptiveSchedule(steps, most, **dict(self.adaptive), interval=self.interval or 0)
        if self.interval is None:
            return FixedSchedule(fixed_steps(steps, most))
        return FixedSchedule(every_steps(steps, self.interval), most)

    def element_scores(self) -> ElementScores:
        return ElementScores()

    def choose(self, scores: Tensor | None) -> tuple[int, ...]:
        """The ⌊γ·r⌋ components with the lowest scores, the lower number first among equals."""
        lowest = scores.sort(stable=True).indices[: self.replaced_at_once]
        return tuple(sorted(lowest.tolist()))

    # ------------------------------------------------------------------ replacing

    def refill_from(self) -> Literal["reserve", "gradient", "restart"]:
        return "reserve" if self.refill == "spectrum" else "gradient"

    def refill_probe(self) -> ProbeSettings | None:
        return self.probe if self.refill == "gradient" else None

    def new_components(self, layer: LayerInit, magnitude: float, count: int) -> LowRank:
        """`s·B'·A' = magnitude · U Vᵀ` of the `count` leading singular directions of −g, cast.

        The singular values of a gradient say nothing about the size of a weight, so every direction gets
        `magnitude`. The sign is that of descent, so that the first steps lengthen the components.
        """
        u, sigma, vt = truncated_svd(-layer.source.to(layer.device), count, layer.generator)
        return balanced(u, torch.full_like(sigma, magnitude), vt, self.scaling, layer.dtype)

    def update_rounding(self) -> Rounding:
        return self.rounding

    def fuses_beside(self, packed: bool) -> bool:
        return packed if self.fuse_into is None else self.fuse_into == "sidecar"

    def fuse(
        self, factors: Factors, used: Factors, replaced: tuple[int, ...], new: LowRank | None
    ) -> Recomposition:
        """W ← W + s·(B₁A₁ − B₁'A₁') as one pair: left = s·[B₁ | −B₁'], right = [A₁; A₁']."""
        chosen = list(replaced)
        b_new, a_new = new.left.to(used["B"]), new.right.to(used["A"])
        left = self.scaling * torch.cat([used["B"][:, chosen], -b_new], 1)
        right = torch.cat([used["A"][chosen], a_new])
        b, a = factors["B"].clone(), factors["A"].clone()
        b[:, chosen], a[chosen] = b_new.to(b), a_new.to(a)
        return Recomposition({"A": a, "B": b}, LowRank(left, right), replaced)


def _columns(pair: LowRank, which: slice) -> LowRank:
    """Some components of a pair, copied."""
    return LowRank(
        pair.left[:, which].clone(memory_format=torch.contiguous_format), pair.right[which].clone()
    )
